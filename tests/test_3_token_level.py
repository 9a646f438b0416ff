"""The token level: a response is a path of tokens, and the same policy is the optimum of a game with a token a move
(From r to Q*, https://arxiv.org/abs/2404.12358; equation numbers with a * are its own). And what the loss does to
probabilities, as opposed to margins. float64, 1e-10 unless stated."""
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpo
import tabular
import world
from tools import betas, grades, assert_same, softplus, vector, worlds

V, T = 3, 3


@pytest.fixture(params=[0.4, 1.0, 3.0], ids=lambda beta: f"beta={beta}")
def tree(request):
    """(beta, token-level reference, reward of every sequence (3,3,3)): all 27 texts of three tokens over three."""
    return request.param, tabular.random_tree(V, T), 1.5 * torch.randn(V, V, V, dtype=torch.float64)


def at_the_end(reward):
    """A reward for whole texts as token rewards: nothing until the last token."""
    return [torch.zeros(V, dtype=torch.float64), torch.zeros(V, V, dtype=torch.float64), reward]


def test_soft_value_iteration_is_the_optimal_policy(tree):
    """Claim 18 (Eq. 5*-7*, and 4). Backwards from the last token, the product of the tokens' policies is the pi* of whole
    sequences, and V(s_0) = beta log Z; pi* and Z by plain sums over the 27 texts."""
    beta, ref, reward = tree
    values, policy = tabular.soft_value_iteration(ref, at_the_end(reward), beta)
    z = 0.0
    for y in itertools.product(range(V), repeat=T):
        z += math.exp(sum(ref[t][y[:t + 1]].item() for t in range(T))) * math.exp(reward[y].item() / beta)
    assert_same(values[0], vector(beta * math.log(z))[0], 1e-10, {"beta is lost: V(s_0) = beta log Z": vector(math.log(z))[0]}, what="V(s_0)")
    for level in policy:
        assert_same(level.exp().sum(-1), torch.ones(level.shape[:-1], dtype=torch.float64), 1e-12, what="a token's policy, summed,")
    for y in itertools.product(range(V), repeat=T):
        star = math.exp(sum(ref[t][y[:t + 1]].item() for t in range(T)) + reward[y].item() / beta) / z
        assert_same(sum(policy[t][y[:t + 1]] for t in range(T)).exp(), vector(star)[0], 1e-10, what=f"pi*{y}")


def test_token_log_ratios_add_up_to_the_advantage(tree):
    """Claim 19 (Eq. 10*). sum_t beta log(pi*/ref) = r - V(s_0); and each term is r_t + V(s_(t+1)) - V(s_t), also with
    rewards at every token."""
    beta, ref, reward = tree
    for token_rewards in (at_the_end(reward), [torch.randn_like(level) for level in ref]):
        values, policy = tabular.soft_value_iteration(ref, token_rewards, beta)
        ratios = [beta * (pi - q) for pi, q in zip(policy, ref)]
        total = tabular.along(token_rewards)[-1]
        assert_same(tabular.along(ratios)[-1], total - values[0], 1e-10, {"V(s_0) is missing": total}, what="the sum of token rewards")
        for t in range(T):
            for s in itertools.product(range(V), repeat=t + 1):
                assert_same(ratios[t][s], token_rewards[t][s] + values[t + 1][s] - values[t][s[:-1]], 1e-10, what=f"the token {s}")


def test_prefix_sums_are_what_the_prefix_promises(tree):
    """Claim 20. The log-ratios summed over a prefix = beta log E_ref[e^(r/beta) | prefix] - V(s_0): DPO's policy holds an
    exact value function of every prefix. The conditional expectation by plain sums."""
    beta, ref, reward = tree
    values, policy = tabular.soft_value_iteration(ref, at_the_end(reward), beta)
    sums = tabular.along([beta * (pi - q) for pi, q in zip(policy, ref)])
    for t in range(T):
        for prefix in itertools.product(range(V), repeat=t + 1):
            promise = 0.0
            for rest in itertools.product(range(V), repeat=T - t - 1):
                y = prefix + rest
                promise += math.exp(sum(ref[k][y[:k + 1]].item() for k in range(t + 1, T)) + reward[y].item() / beta)
            assert_same(sums[t][prefix], beta * math.log(promise) - values[0], 1e-10, what=f"the prefix {prefix}")


@given(worlds(policies=1), betas)
def test_the_mean_implicit_reward_reads_off_a_kl(drawn, beta):
    """Claim 21 (Eq. 16*). E_ref[r^] = -beta KL(ref || pi): with pairs drawn from ref, the mean of chosen and rejected rewards
    is never positive: negative rewards are no sign of failure. And if ref is the chosen responses' own distribution (a
    reference fitted to them), the mean chosen reward alone is <= 0 for every policy."""
    ref, _, pi = drawn
    rewards = tabular.implicit_reward(pi, ref, beta)
    mean = (ref.exp() * rewards).sum()
    assert_same(mean, vector(-beta * math.fsum(math.exp(q) * (q - p) for q, p in zip(ref.tolist(), pi.tolist())))[0], 1e-10, {
        "KL(pi || ref) is the other direction": -beta * world.kl(pi, ref)}, what="E_ref[r^]")
    assert mean <= 1e-12 * max(1, beta)


@grades("dpo_loss")
@given(worlds(n=4), betas)
def test_a_tabular_pair_alone_cannot_lower_the_chosen(drawn, beta):
    """Claim 22. Independent logits, one pair: a step along -grad L is along e_w - e_l, and with it dlog pi_w = 1 - pi_w + pi_l
    > 0, dlog pi_l = pi_l - pi_w - 1 < 0, and dlog pi_c = pi_l - pi_w for everybody else, per unit of step."""
    ref, start = drawn
    theta = start.clone().requires_grad_()
    logps = torch.log_softmax(theta, -1)
    loss = dpo.dpo_loss(logps[:1], logps[1:2], ref[:1], ref[1:2], beta=beta)[0].sum()
    step = -torch.autograd.grad(loss, theta, retain_graph=True)[0]
    assert step[0] >= 0 and (step[2:].abs() <= 1e-12 * max(1, beta)).all(), "only the two logits of the pair are moved"
    assert_same(step[1], -step[0], 1e-12 * max(1, beta), what="the step of the rejected logit")
    direction = vector(1, -1, 0, 0)
    change = torch.autograd.functional.jvp(lambda t: torch.log_softmax(t, -1), theta.detach(), direction)[1]
    p = torch.softmax(theta.detach(), -1)
    assert_same(change, torch.stack([1 - p[0] + p[1], p[1] - p[0] - 1, p[1] - p[0], p[1] - p[0]]), 1e-12, what="dlog pi")
    assert change[0] > 0


@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.2, 2.0])
def test_what_is_in_no_pair_is_not_looked_at(beta):
    """Claim 23 (compare Xu et al., https://arxiv.org/abs/2404.10719, Table 1). Responses 2 and 3 are in no pair: after any
    amount of training pi(2)/pi(3) is still ref(2)/ref(3) (1e-12), however bad 3 may be, while their mass together moves."""
    ref = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)

    def loss(theta):
        logps = torch.log_softmax(theta, -1)
        return dpo.dpo_loss(logps[:1], logps[1:2], ref[:1], ref[1:2], beta=beta)[0].sum()
    logps = torch.log_softmax(tabular.gradient_flow(loss, ref, 30.0), -1)
    assert_same(logps[2] - logps[3], ref[2] - ref[3], 1e-12, what="log pi(2)/pi(3)")
    assert (logps[:2] - ref[:2]).abs().max() > 0.1, "training did nothing"


@grades("dpo_loss")
def test_a_shared_feature_can_push_the_chosen_down():
    """Claim 24 (likelihood displacement). Log-linear in one feature, w: 1, l: 0, c: 3, uniform start: the step that raises
    h raises the feature's weight, and so favours c, which has most of it: one DPO step lowers w and l and raises c, while
    the margin grows. Sums by hand: dlog pi_y = (phi_y - mean phi), mean phi = 4/3."""
    phi = vector(1, 0, 3)
    ref = torch.log_softmax(torch.zeros(3, dtype=torch.float64), -1)
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logps = torch.log_softmax(weight * phi, -1)
    loss = dpo.dpo_loss(logps[:1], logps[1:2], ref[:1], ref[1:2], beta=0.5)[0].sum()
    step = -torch.autograd.grad(loss, weight)[0]
    assert_same(step, vector(0.5 * 0.5 * (1 - 0))[0], 1e-12, what="the step, beta sigma(0) (phi_w - phi_l),")
    after = torch.log_softmax(1e-3 * step * phi, -1)
    assert_same((after - ref) / (1e-3 * step), phi - 4 / 3, 1e-3, what="dlog pi")
    assert after[0] < ref[0] and after[1] < ref[1] and after[2] > ref[2]
    assert after[0] - after[1] > ref[0] - ref[1], "the margin grows all the same"


def test_eq7_does_not_see_mass_that_leaks_evenly():
    """Why `missing_mass` exists: moving both responses down alike leaves the loss where it was."""
    w, l, rw, rl = torch.randn(4, 9, dtype=torch.float64)
    loss = lambda down: dpo.dpo_loss(w - down, l - down, rw, rl)[0]
    assert_same(loss(3), loss(0), 1e-12, what="the loss after both fell by 3 nats")
    assert dpo.missing_mass(w - 3, rw) > dpo.missing_mass(w, rw)


@grades("missing_mass")
@given(st.integers(0, 10 ** 6))
def test_missing_mass_is_unbiased(seed):
    """Eq. 9. E_{y ~ ref}[1 - pi/ref], summed over a tabular world of which ref writes 4 responses of 5, is the mass of the
    fifth, for every policy (1e-10)."""
    g = torch.Generator().manual_seed(seed)
    ref = torch.softmax(torch.randn(4, generator=g, dtype=torch.float64), -1)
    logps = torch.log_softmax(2 * torch.randn(5, generator=g, dtype=torch.float64), -1)
    estimates = torch.stack([torch.as_tensor(dpo.missing_mass(logps[y:y + 1], ref[y:y + 1].log())) for y in range(4)])
    assert estimates.shape == (4,), "a scalar for each call"
    assert_same((ref * estimates).sum(), logps[4].exp(), 1e-10, {"1 - is missing: that is the mass that is still there": 1 - logps[4].exp()},
         what="E_ref[missing_mass]")


@grades("missing_mass")
def test_missing_mass_is_the_mean_of_ratios():
    """Over a batch it is 1 - mean(pi/ref): not exp of a mean, not pi alone."""
    assert_same(dpo.missing_mass(vector(0.5, 0.1).log(), vector(0.25, 0.4).log()), vector(1 - (2 + 0.25) / 2)[0], 1e-12, {
        "exp of the mean; wanted the mean of exp": vector(1 - 0.5 ** 0.5)[0], "a sum; wanted the mean": vector(1 - 2.25)[0],
        "the ratio is upside down: it is pi/ref": vector(1 - (0.5 + 4) / 2)[0],
        "the ratio of means; wanted the mean of ratios": vector(1 - 0.6 / 0.65)[0]}, what="missing_mass")


@grades("missing_mass")
def test_missing_mass_does_not_pull_at_a_policy_that_leaks_nothing():
    """Its gradient, averaged over ref, is zero where the policy has all its mass on ref's support (1e-12): the optimum
    of Eq. 7 stays the optimum. Where it leaks, the gradient is not zero."""
    ref = torch.softmax(torch.randn(4, dtype=torch.float64), -1)
    theta = torch.randn(5, dtype=torch.float64)

    def pull(theta):
        theta = theta.clone().requires_grad_()
        logps = torch.log_softmax(theta, -1)
        loss = sum(q * dpo.missing_mass(logps[y:y + 1], ref[y:y + 1].log()) for y, q in enumerate(ref))
        return torch.autograd.grad(loss, theta)[0].abs().max()
    leaks = pull(theta)
    theta[4] = -80.0
    assert leaks > 1e-3, "it must pull at a policy that leaks"
    assert pull(theta) < 1e-12
