"""MDPO: mirror descent policy optimisation, on-policy, https://arxiv.org/abs/2005.09814.

    pi_{k+1} = argmax E_{s ~ pi_k}[ E_{a ~ pi}[A_k(s,a)] - KL(pi || pi_k)(s) / t_k ]

Each step is approximate: it takes several gradient steps on the same samples. As in the authors'
code, advantages are normalised, KL(pi || pi_k) is exact over the actions, which are tokens here,
and t_k falls linearly to 0. Unlike their code, there is no critic, the gradient steps are on
minibatches, and gamma = 1. So it differs from this project's REINFORCE++ in one thing: a divergence
takes the place of the clip.
"""
import copy

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from ppo import normalise, ppo_loss, reward_to_go
from rlhf import Settings, rollout


def mirror_loss(logps, old_logps, advantages, divergence, mask, t):
    """-(rho A - KL(pi || pi_k) / t), rho = pi/pi_k, summed over a response's tokens, mean over
    responses. All (B,S) -> a scalar. At pi_k the divergence has no gradient, and what is left is
    the policy gradient."""
    proximity = torch.where(mask, divergence, 0.0).sum(-1).mean()
    return ppo_loss(logps, old_logps, advantages, mask, clip=None) + proximity / t


def distributions(model, tokens, mask):
    """log pi over the vocabulary where mask (B,S) is true. (N,V)"""
    return model.head(model.hidden(tokens[:, :-1], needed=mask)[mask]).log_softmax(-1)


def learn(policy, reference, score, prompts, *, beta, samples, t, seed):
    """rlhf.learn without a critic, with mirror steps. t: t_0, a larger one takes larger steps.
    The other numbers are those of rlhf.Settings."""
    s, choose = Settings(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=s.lr, betas=(0.9, 0.95), eps=1e-5)
    batches = samples // s.batch_size
    for k in tqdm(range(batches), desc="mdpo", unit="batch", dynamic_ncols=True):
        which = torch.randint(len(prompts), (s.batch_size,), generator=choose).tolist()
        batch = rollout(policy, reference, None, score, [prompts[i] for i in which], beta)
        mask = batch["mask"]  # (B, S)
        advantages = normalise(reward_to_go(batch["rewards"], mask), mask)  # (B, S)
        old, left = copy.deepcopy(policy).requires_grad_(False), 1 - k / batches
        for group in optimizer.param_groups:
            group["lr"] = s.lr * left
        for _ in range(s.epochs):
            for part in torch.randperm(s.batch_size, generator=choose).split(s.minibatch_size):
                tokens, inside = batch["tokens"][part], mask[part]  # (b, T), (b, S)
                now, then = [distributions(model, tokens, inside) for model in (policy, old)]
                action = tokens[:, 1:][inside][:, None]  # (N, 1)
                zeros = torch.zeros(inside.shape)  # (b, S)
                logps = zeros.masked_scatter(inside, now.gather(1, action))  # (b, S)
                divergence = zeros.masked_scatter(inside, (now.exp() * (now - then)).sum(-1))
                loss = mirror_loss(logps, batch["logps"][part], advantages[part], divergence,
                                   inside, t * left)
                optimizer.zero_grad()
                loss.backward()
                clip_grad_norm_(policy.parameters(), s.max_grad_norm)
                optimizer.step()
