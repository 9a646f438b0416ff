"""The derivation on worlds of a few responses, where every sum over y is written out and a policy is a list of numbers.

A tabular world is two vectors over its N responses, float64: ref_logps (N,), the reference's log-probabilities, and
reward (N,). A policy is its log-probabilities, logps (N,); where it is to be learned, logps = log_softmax(theta) with a free
logit for every response, so that nothing but the objective decides where it ends. The exact quantities of world.py (Z, pi*,
KL, win rate, frontier) take these vectors as they are. The tests and the notebooks share what is here.

Equation numbers are those of the DPO paper, https://arxiv.org/abs/2305.18290v3, unless another is named.
"""
import math

import torch

import dpo
import world


def random_world(n, spread=1.5):
    """(ref_logps, reward), each (n,): a reference with full support and rewards of the given standard deviation."""
    ref_logps = torch.log_softmax(torch.randn(n, dtype=torch.float64), -1)
    return ref_logps, spread * torch.randn(n, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------------
# The objective and the reward behind a policy

def objective(logps, ref_logps, reward, beta):
    """J(pi) = E[r] - beta KL(pi || ref), Eq. 3. (..., N) each -> (...)"""
    return world.expected(logps, reward) - beta * world.kl(logps, ref_logps)


def implicit_reward(logps, ref_logps, beta):
    """r^(y) = beta log(pi(y)/ref(y)), section 4: the reward that a policy is the optimum for. (..., N)"""
    return beta * (logps - ref_logps)


def project(ref_logps, reward, beta):
    """f(r) = r - beta log Z, Eq. 8: of all rewards that rank alike, r + f(x), the one that is an implicit reward. (..., N)"""
    return reward - beta * world.log_partition(ref_logps, reward, beta).unsqueeze(-1)


def total_variation(logps, other_logps):
    """Half the sum of absolute differences of the probabilities: 0 alike, 1 disjoint. (..., N) each -> (...)"""
    return (logps.exp() - other_logps.exp()).abs().sum(-1) / 2


# --------------------------------------------------------------------------------------------------------------------
# Preferences

def preferences(reward):
    """Bradley-Terry, Eq. 1: entry [i, j] is p(i is preferred to j) = sigma(r_i - r_j). (N,) -> (N, N)"""
    return world.preference_prob(reward[:, None], reward[None, :])


def plackett_luce(reward, ranking):
    """log p(ranking), Eq. 18: the best is drawn by a softmax over all, the second over the rest, and so on.

    reward (N,); ranking: a list of response numbers, best first. Returns a scalar."""
    r = reward[ranking]                                                                               # (K,)
    return (r - torch.stack([r[k:].logsumexp(0) for k in range(len(r))])).sum()


def plackett_luce_loss(logps, ref_logps, ranking, beta):
    """The DPO loss of a whole ranking, Eq. 20: Plackett-Luce with the implicit reward. A scalar."""
    return -plackett_luce(implicit_reward(logps, ref_logps, beta), ranking)


def pair_losses(logps, ref_logps, beta, **kind):
    """Entry [i, j]: `dpo.dpo_loss` of the pair in which i was preferred to j. (N,), (N,) -> (N, N)"""
    n = len(logps)
    i, j = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    return dpo.dpo_loss(logps[i], logps[j], ref_logps[i], ref_logps[j], beta=beta, **kind)[0].view(n, n)


def population_loss(logps, ref_logps, preference, beta, drawn=None, **kind):
    """The DPO loss with nothing left to chance: i and j are compared as often as drawn[i, j] says, and labelled with their
    exact probability: E[L] = sum_ij drawn_ij (p_ij L(i over j) + p_ji L(j over i)) = 2 sum_ij drawn_ij p_ij L(i over j).

    preference (N,N) from `preferences`; drawn (N,N), symmetric: two independent samples of the reference by default;
    kind: loss_type and label_smoothing of `dpo.dpo_loss`. Returns a scalar, ln 2 at the reference.
    """
    if drawn is None:
        drawn = ref_logps.exp()[:, None] * ref_logps.exp()[None, :]
    return 2 * (drawn * preference * pair_losses(logps, ref_logps, beta, **kind)).sum()


# --------------------------------------------------------------------------------------------------------------------
# Getting to a minimum, and getting there

def minimise(loss, theta, steps=200):
    """The theta at which loss(theta) is least, by LBFGS. theta: where to start; returns a new tensor."""
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=steps, tolerance_grad=1e-14, tolerance_change=0, history_size=20,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value
    for _ in range(5):                       # begun anew, LBFGS forgets what rounding made of its picture of the curvature
        optimizer.step(closure)
    return theta.detach()


def gradient_flow(loss, theta, time, steps=400):
    """theta after following d theta/dt = -grad loss(theta) for the given time: gradient descent with steps so small that
    it is a curve. By the classical Runge-Kutta method."""
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
    """The Laplacian of a graph, degrees on the diagonal minus weights. weights (N,N), symmetric, 0 on the diagonal."""
    return torch.diag(weights.sum(-1)) - weights


# --------------------------------------------------------------------------------------------------------------------
# The token level: a tree of all sequences of T tokens over V, https://arxiv.org/abs/2404.12358 (From r to Q*)
# A quantity of level t is a tensor with t+1 axes of size V: its entry [a, b, c] belongs to the tokens a, b, c.

def random_tree(vocab, length):
    """log ref(y_t | y_<t): a list with a level a token, (V,), (V,V), ..., each normalised over its last axis."""
    return [torch.log_softmax(torch.randn(*[vocab] * (t + 1), dtype=torch.float64), -1) for t in range(length)]


def along(levels):
    """Sums along paths: levels [(V,), (V,V), ...] -> [level 0, level 0 + level 1, ...], the last one over whole sequences."""
    sums = [levels[0]]
    for level in levels[1:]:
        sums.append(sums[-1].unsqueeze(-1) + level)
    return sums


def soft_value_iteration(ref_token_logps, token_rewards, beta):
    """Their Eq. 5 to 7, backwards from the last token: Q = r_t + V', V = beta log sum ref exp(Q/beta), pi = ref exp((Q-V)/beta).

    token_rewards: a list like ref_token_logps; a reward for whole sequences has zeros at all levels but the last.
    Returns values and policy: values[t] is V before token t, with t axes (values[0] is V(s_0)), values[T] = 0;
    policy[t] is log pi(y_t | y_<t).
    """
    values, policy = [torch.zeros_like(token_rewards[-1])], []
    for ref, reward in zip(reversed(ref_token_logps), reversed(token_rewards)):
        q = reward + values[0]                                                # V' is the value after the token
        value = beta * (ref + q / beta).logsumexp(-1)
        policy.insert(0, ref + (q - value.unsqueeze(-1)) / beta)
        values.insert(0, value)
    return values, policy


# --------------------------------------------------------------------------------------------------------------------
# Other objectives

def psi_policy(ref_logps, preference, sampler, psi, tau):
    """PsiPO's optimum, https://arxiv.org/abs/2310.12036: pi ~ ref exp(E_{y' ~ sampler}[psi(p(y over y'))] / tau). (N,)

    preference (N,N); sampler (N,), log-probabilities; psi: a function of probabilities (the identity gives IPO)."""
    worth = (psi(preference) * sampler.exp()).sum(-1)                                                 # (N,)
    return world.optimal_policy(ref_logps, worth, tau)


def kl_estimators(logps, ref_logps):
    """Three estimates of KL(pi || ref) from a sample y ~ pi, http://joschu.net/blog/kl-approx.html, for every y: (N,) each.

    k1 = log(pi/ref), k2 = k1^2 / 2, k3 = ref/pi - 1 + k1."""
    k1 = logps - ref_logps
    return k1, k1 ** 2 / 2, torch.expm1(-k1) + k1


def mirror_step(logps, worth, t, ref_logps=None, beta=0.0):
    """One step of mirror descent: the policy that maximises E[worth] - beta KL(pi || ref) - KL(pi || current) / t. (N,)

    worth: a reward or an advantage, they differ by a constant. With beta = 0 it is MDPO's step (https://arxiv.org/abs/2005.09814):
    pi ~ current exp(t worth)."""
    pull = 0.0 if ref_logps is None else beta * ref_logps
    return torch.log_softmax((logps + t * (worth + pull)) / (1 + t * beta), -1)


def best_of_n(ref_logps, reward, n):
    """log-probabilities of the best of n samples of the reference: F^n - F_-^n, F the probability of a reward at most this
    one, F_- of a smaller one; ties by their share. (N,)"""
    p = ref_logps.exp()
    at_most = (p * (reward[None, :] <= reward[:, None])).sum(-1)                                      # (N,)
    less = (p * (reward[None, :] < reward[:, None])).sum(-1)
    return ((at_most ** n - less ** n) * p / (at_most - less)).log()


def preferred_ft(ref_logps, preference):
    """What maximum likelihood on the chosen responses ends at, pairs drawn from ref x ref: 2 ref(y) p(y over ref). (N,)"""
    return math.log(2) + ref_logps + (preference * ref_logps.exp()).sum(-1).log()
