"""The derivation on worlds of a few responses: every sum over y is written out.

A tabular world is two vectors over its N responses, in float64: ref_logps (N,), the
log-probabilities of the reference, and reward (N,). A policy is its log-probabilities, logps (N,).
A policy that is learned is log_softmax(theta), with one free logit for each response. So nothing
but the objective decides where it ends. The exact quantities of world.py (Z, pi*, KL, win rate,
frontier) take these vectors as they are. The tests and the notebooks share what is here.

Equation numbers without a name are those of the DPO paper, https://arxiv.org/abs/2305.18290v3.
"""
import math

import torch

import dpo
import world


def random_world(n, spread=1.5):
    """(ref_logps, reward), each (n,): a reference that gives no response probability 0, and
    rewards whose standard deviation is `spread`."""
    ref_logps = torch.log_softmax(torch.randn(n, dtype=torch.float64), 0)
    return ref_logps, spread * torch.randn(n, dtype=torch.float64)


# ---- The objective, and the reward behind a policy

def objective(logps, ref_logps, reward, beta):
    """J(pi) = E[r] - beta KL(pi || ref), Eq. 3. (..., N) each -> (...)"""
    return world.expected(logps, reward) - beta * world.kl(logps, ref_logps)


def implicit_reward(logps, ref_logps, beta):
    """beta log(pi/ref), section 4: the reward that this policy is the optimum for. (..., N)"""
    return beta * (logps - ref_logps)


def project(ref_logps, reward, beta):
    """f(r) = r - beta log Z, Eq. 8. (..., N) each -> (..., N)

    Rewards that differ by a function of x rank all responses alike. f(r) is the one of them that
    is an implicit reward.
    """
    return reward - beta * world.log_partition(ref_logps, reward, beta).unsqueeze(-1)


def total_variation(logps, other_logps):
    """Half the sum of the absolute differences of the probabilities. (..., N) each -> (...)

    It is 0 for equal policies, and 1 for policies that have no response in common.
    """
    return (logps.exp() - other_logps.exp()).abs().sum(-1) / 2


# ---- Preferences

def preferences(reward):
    """Bradley-Terry, Eq. 1: entry [i, j] is p(i is preferred to j). (N,) -> (N, N)"""
    return world.preference_prob(reward[:, None], reward[None, :])


def plackett_luce(reward, ranking):
    """log p(ranking), Eq. 18. The best is drawn by a softmax over all responses, the second by a
    softmax over the rest, and so on.

    reward (N,). ranking: a list of response numbers, the best first. Returns a scalar.
    """
    r = reward[ranking]  # (K,)
    return (r - torch.stack([r[k:].logsumexp(0) for k in range(len(r))])).sum()


def plackett_luce_loss(logps, ref_logps, ranking, beta):
    """The DPO loss of a whole ranking, Eq. 20: Plackett-Luce with the implicit reward. A scalar."""
    return -plackett_luce(implicit_reward(logps, ref_logps, beta), ranking)


def pair_losses(logps, ref_logps, beta, loss=None, **options):
    """Entry [i, j]: the loss of the pair in which i was preferred to j. (N,), (N,) -> (N, N)

    loss: a function of losses.LOSSES, by default dpo.dpo_loss. options: its label_smoothing.
    """
    loss = loss or dpo.dpo_loss
    n = len(logps)
    i, j = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)  # (N*N,)
    chosen, rejected, ref_chosen, ref_rejected = logps[i], logps[j], ref_logps[i], ref_logps[j]
    losses = loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, **options)[0]  # (N*N,)
    return losses.view(n, n)


def population_loss(logps, ref_logps, preference, beta, drawn=None, loss=None, **options):
    """The expected loss over all pairs and labels. Nothing is left to chance. A scalar.

    i and j are compared as often as drawn[i, j] says, and i wins with probability p_ij. So
    E[L] = sum_ij drawn_ij (p_ij L(i over j) + p_ji L(j over i))
         = 2 sum_ij drawn_ij p_ij L(i over j).
    preference (N,N): from `preferences`. drawn (N,N), symmetric: by default two independent
    samples of the reference. loss, options: as for `pair_losses`. DPO's is ln 2 at the reference.
    """
    if drawn is None:
        drawn = ref_logps.exp()[:, None] * ref_logps.exp()[None, :]
    return 2 * (drawn * preference * pair_losses(logps, ref_logps, beta, loss, **options)).sum()


# ---- Finding a minimum, and the way to it

def minimise(loss, theta):
    """The theta at which loss(theta) is smallest, by LBFGS. theta: the start. A new tensor."""
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-14,
                                  tolerance_change=0, history_size=20,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    # LBFGS builds up a picture of the curvature, and rounding spoils it. So it starts afresh.
    for _ in range(5):
        optimizer.step(closure)
    return theta.detach()


def gradient_flow(loss, theta, time, steps=400):
    """theta after following d theta/dt = -grad loss(theta) for the given time.

    This is gradient descent with infinitely small steps. It is computed by the classical
    Runge-Kutta method.
    """
    def slope(theta):
        theta = theta.detach().requires_grad_()
        return -torch.autograd.grad(loss(theta), theta)[0]

    theta, dt = theta.clone(), time / steps
    for _ in range(steps):
        a = slope(theta)
        b = slope(theta + dt / 2 * a)
        c = slope(theta + dt / 2 * b)
        d = slope(theta + dt * c)
        theta = theta + dt / 6 * (a + 2 * b + 2 * c + d)
    return theta


def laplacian(weights):
    """The Laplacian of a graph: the degrees on the diagonal, minus the weights. (N, N) -> (N, N)

    weights: symmetric. What stands on their diagonal cancels.
    """
    return torch.diag(weights.sum(0)) - weights


# ---- The token level: a tree of all sequences of T tokens from a vocabulary of V tokens
# The paper is From r to Q*, https://arxiv.org/abs/2404.12358. A quantity of level t is a tensor
# with t+1 axes of size V. Its entry [a, b, c] belongs to the tokens a, b, c.

def random_tree(vocab, length):
    """log ref(y_t | y_<t): a list with one level for each token, (V,), (V,V), ... Each level is
    normalised over its last axis."""
    levels = []
    for t in range(length):
        logits = torch.randn(*[vocab] * (t + 1), dtype=torch.float64)
        levels.append(torch.log_softmax(logits, -1))
    return levels


def along(levels):
    """Sums along paths: [level 0, level 1, ...] -> [level 0, level 0 + level 1, ...]. The last
    one belongs to whole sequences."""
    sums = [levels[0]]
    for level in levels[1:]:
        sums.append(sums[-1].unsqueeze(-1) + level)
    return sums


def soft_value_iteration(ref_token_logps, token_rewards, beta):
    """Eq. 5 to 7 of From r to Q*, from the last token backwards:
    Q = r_t + V',  V = beta log sum ref exp(Q/beta),  pi = ref exp((Q - V)/beta).

    token_rewards: a list of levels like ref_token_logps. A reward for whole sequences is 0 at all
    levels but the last. Returns values and policy, two lists. values[t] is V before token t: it
    has t axes, values[0] is V(s_0), and values[T] is 0. policy[t] is log pi(y_t | y_<t).
    """
    values, policy = [torch.zeros_like(token_rewards[-1])], []
    for ref, reward in zip(reversed(ref_token_logps), reversed(token_rewards)):
        q = reward + values[0]  # V' is the value after the token
        value = beta * (ref + q / beta).logsumexp(-1)
        policy.insert(0, ref + (q - value.unsqueeze(-1)) / beta)
        values.insert(0, value)
    return values, policy


# ---- Other objectives

def psi_policy(ref_logps, preference, sampler, psi, tau):
    """PsiPO's optimum, https://arxiv.org/abs/2310.12036: pi(y) is proportional to
    ref(y) exp(E_{y' ~ sampler}[psi(p(y over y'))] / tau). (N,)

    preference (N,N). sampler (N,): log-probabilities. psi: a function of probabilities. The
    identity gives IPO.
    """
    worth = (psi(preference) * sampler.exp()).sum(-1)  # (N,)
    return world.optimal_policy(ref_logps, worth, tau)


def kl_estimators(logps, ref_logps):
    """Three estimates of KL(pi || ref) from one sample y ~ pi, for every y: (N,) each.

    k1 = log(pi/ref), k2 = k1^2 / 2, k3 = ref/pi - 1 + k1. http://joschu.net/blog/kl-approx.html
    """
    k1 = logps - ref_logps
    return k1, k1 ** 2 / 2, torch.expm1(-k1) + k1


def mirror_step(logps, worth, t, ref_logps=0.0, beta=0.0):
    """One step of mirror descent. (N,)

    It is the policy that maximises E[worth] - beta KL(pi || ref) - KL(pi || current) / t.
    worth (N,): a reward or an advantage, which differ by a constant. With beta = 0 the reference
    has no effect. Then it is the step of MDPO, https://arxiv.org/abs/2005.09814: pi is proportional
    to current exp(t worth).
    """
    pull = beta * ref_logps
    return torch.log_softmax((logps + t * (worth + pull)) / (1 + t * beta), 0)


def best_of_n(ref_logps, reward, n):
    """Log-probabilities of the best of n samples of the reference. (N,)

    The best sample has this reward with probability F^n - F_-^n. F is the probability of a reward
    of at most this one, F_- of a smaller one. Responses with the same reward share it.
    """
    p = ref_logps.exp()
    at_most = (p * (reward[None, :] <= reward[:, None])).sum(-1)  # (N,)
    less = (p * (reward[None, :] < reward[:, None])).sum(-1)  # (N,)
    return ((at_most ** n - less ** n) * p / (at_most - less)).log()


def preferred_ft(ref_logps, preference):
    """Where maximum likelihood on the chosen responses ends, if both responses of every pair come
    from the reference: 2 ref(y) p(y preferred to a sample of the reference). (N,)"""
    return math.log(2) + ref_logps + (preference * ref_logps.exp()).sum(-1).log()
