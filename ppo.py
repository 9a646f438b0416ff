"""From scores to a gradient: the mathematics of PPO and REINFORCE++, as pure functions on tensors.

rlhf.py learns a policy with them. The papers: PPO https://arxiv.org/abs/1707.06347, generalised
advantage estimation https://arxiv.org/abs/1506.02438, REINFORCE++ https://arxiv.org/abs/2501.03262.
Other equation numbers are those of the DPO paper, https://arxiv.org/abs/2305.18290v3.

B responses, S predictions: entry t of a (B,S) tensor is about token t+1, as in dpo.token_logps.
mask (B,S) is true where that token belongs to the response, EOS included. Every response token is
an action. Its state is the prompt and the response so far.
"""
import torch


def last_true(mask):
    """The index of the last true entry in each row. (B,T) -> (B,)"""
    return mask.size(1) - 1 - mask.flip(1).float().argmax(1)


def token_rewards(scores, logps, ref_logps, mask, beta):
    """Eq. 3 as a reward for every token: -beta log(pi/ref) of the token,
    and the response's score at its last token. (B,S), 0 outside the mask

    They add up to r(x,y) - beta log(pi(y|x)/ref(y|x)). scores (B,).
    logps, ref_logps (B,S): of the generating policy and the reference.
    """
    penalty = torch.where(mask, -beta * (logps - ref_logps), 0.0)  # (B, S)
    last = last_true(mask)  # (B,)
    return penalty.scatter_add(1, last[:, None], scores[:, None].to(penalty.dtype))


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation, 1506.02438, Eq. 16. (B,S)

    It adds TD errors delta_t = r_t + gamma V(s_{t+1}) - V(s_t), each later
    one weighted by another gamma lam. lam = 0 is the TD error, biased
    where V is wrong. lam = gamma = 1 is the return minus V, unbiased.
    values[t] is V of the state before token t+1. The end has value 0.
    """
    values = torch.where(mask, values, 0.0)
    advantage = next_value = 0.0
    advantages = []
    for t in reversed(range(mask.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantage = delta + gamma * lam * advantage  # (B,)
        advantage = torch.where(mask[:, t], advantage, 0.0)
        next_value = values[:, t]
        advantages.insert(0, advantage)
    return torch.stack(advantages, 1)  # (B, S)


def reward_to_go(rewards, mask):
    """All rewards still to come, REINFORCE++'s advantage before it is
    normalised: `gae` with V = 0 and lam = gamma = 1. (B,S)"""
    rewards = torch.where(mask, rewards, 0.0)
    return rewards.flip(1).cumsum(1).flip(1) * mask


def normalise(advantages, mask):
    """Mean 0 and deviation 1 over the batch's response tokens. (B,S)"""
    inside = advantages[mask]  # (N,)
    normed = (advantages - inside.mean()) / (inside.std() + 1e-8)  # (B, S)
    return torch.where(mask, normed, 0.0)


def ppo_loss(logps, old_logps, advantages, mask, clip):
    """-min(rho A, clip(rho, 1-clip, 1+clip) A), rho = pi/pi_old, summed
    over a response's tokens, mean over responses; 1707.06347, Eq. 7.

    At rho = 1 the gradient is the policy gradient. It is 0 where the
    policy has gone further than clip in the direction of A.
    clip = None: rho A alone. (B,S) each -> a scalar
    """
    ratio = (logps - old_logps).exp()  # (B, S)
    gain = ratio * advantages  # (B, S)
    if clip is not None:
        clipped = ratio.clamp(1 - clip, 1 + clip) * advantages  # (B, S)
        gain = torch.minimum(gain, clipped)
    return -torch.where(mask, gain, 0.0).sum(-1).mean()


def value_loss(values, old_values, returns, mask, clip=None):
    """Half the critic's squared error, a mean over response tokens.

    clip: the critic gains nothing by moving further than this from the
    values it had when the batch was generated. (B,S) each -> a scalar
    """
    error = (values - returns) ** 2  # (B, S)
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)  # (B, S)
        error = torch.maximum(error, (near - returns) ** 2)
    return 0.5 * error[mask].mean()
