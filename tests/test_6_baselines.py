"""What DPO is compared with: best-of-N, Preferred-FT, Unlikelihood (section 6). float64, 1e-10 unless stated."""
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import tabular
import world
from tools import assert_same, vector, worlds


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("reward", [[1.5, -0.3, 0.2, -2.0, 0.9], [1.0, 1.0, 0.2, -2.0, 0.2]], ids=["distinct", "ties"])
def test_best_of_n_by_listing_every_draw(n, reward):
    """Claim 39, the distribution. F^N - F_-^N against all 5^N draws of N responses, the best of each taken (of ties, one
    at random)."""
    ref, reward = torch.log_softmax(torch.randn(5, dtype=torch.float64), -1), vector(*reward)
    p = [0.0] * 5
    for draw in itertools.product(range(5), repeat=n):
        chance = math.prod(ref[y].exp().item() for y in draw)
        best = [y for y in draw if reward[y] == max(reward[z] for z in draw)]
        for y in best:
            p[y] += chance / len(best)
    assert_same(tabular.best_of_n(ref, reward, n).exp(), vector(*p), 1e-12, what=f"best of {n}")


@given(worlds(), st.integers(1, 300))
def test_best_of_ns_kl_and_win_rate_are_bounds(drawn, n):
    """Claim 39, the bounds. KL <= log N - (N-1)/N and win rate (ties 1/2) <= N/(N+1): reached only when no response has a
    noticeable probability of its own. Often quoted as equalities; a few responses make both fall well short."""
    ref, reward = drawn
    best = tabular.best_of_n(ref, reward, n)
    kl, wins = world.kl(best, ref).item(), world.win_rate(best, ref, reward).item()
    assert kl <= math.log(n) - (n - 1) / n + 1e-10
    assert wins <= n / (n + 1) + 1e-10


def test_best_of_ns_bounds_are_reached_by_many_rare_responses():
    """Claim 39, that the bounds are tight: 20,000 equally likely responses come within 1e-3 of both at N = 8, and 3 responses
    stay 0.5 nats below."""
    n, ref = 8, torch.full((20_000,), 1 / 20_000, dtype=torch.float64).log()
    reward = torch.arange(20_000, dtype=torch.float64)
    p = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
    best = (p ** n - (p - 1 / 20_000) ** n).log()                       # F is the rank: the N x N form would need 3 GB
    assert world.kl(best, ref).item() == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-3)
    assert world.win_rate(best, ref, reward).item() == pytest.approx(n / (n + 1), abs=1e-3)
    few = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    assert_same(tabular.best_of_n(ref[:50].log_softmax(-1), reward[:50], n).exp(),
         (torch.arange(1, 51, dtype=torch.float64) / 50) ** n - (torch.arange(50, dtype=torch.float64) / 50) ** n, 1e-12, what="F^N - F_-^N")
    assert world.kl(tabular.best_of_n(few, vector(0, 1, 2), 64), few) < math.log(64) - 63 / 64 - 0.5


@given(worlds(), st.integers(1, 64))
def test_best_of_n_lies_under_the_frontier(drawn, n):
    """Claim 40. No policy has more reward than the optimum at its own KL, and best-of-N is a policy like any other (1e-7)."""
    ref, reward = drawn
    best = tabular.best_of_n(ref, reward, n)
    beta = world.beta_at_kl(ref[None], reward[None], world.kl(best, ref))
    assume(1e-2 < beta < 1e4)                        # beyond, the frontier's end is met to a bisection's precision only
    assert world.expected(best, reward) <= world.expected(world.optimal_policy(ref, reward, beta), reward) + 1e-7


@pytest.mark.parametrize("spread", [0.3, 1.5, 5.0])
def test_preferred_fts_optimum(spread):
    """Claim 41. Maximum likelihood on chosen responses, pairs from ref x ref, ends at 2 ref(y) p(y over ref): by LBFGS on the
    expected log-likelihood, total variation 1e-7. It has no beta: it cannot be told how far to go."""
    ref, reward = tabular.random_world(4, spread)
    preference, q = tabular.preferences(reward), ref.exp()
    chosen = torch.stack([sum(q[i] * q[j] * preference[i, j] + q[j] * q[i] * preference[i, j] for j in range(4)) for i in range(4)])
    optimum = tabular.preferred_ft(ref, preference)
    assert_same(optimum.exp(), chosen, 1e-12, what="Preferred-FT")
    assert_same(optimum.exp().sum(), vector(1.0)[0], 1e-12, {"the 2 is missing: of a pair, one is chosen": vector(0.5)[0]}, what="its sum")
    found = tabular.minimise(lambda theta: -(chosen * torch.log_softmax(theta, -1)).sum(), torch.zeros(4, dtype=torch.float64))
    assert tabular.total_variation(torch.log_softmax(found, -1), optimum) < 1e-7


@given(worlds())
def test_preferred_ft_cannot_go_far(drawn):
    """Claim 42. KL(Preferred-FT || ref) <= ln 2 - 1/2 = 0.193 nats, for every reward and reference."""
    ref, reward = drawn
    assert world.kl(tabular.preferred_ft(ref, tabular.preferences(reward)), ref) <= math.log(2) - 0.5 + 1e-10


def test_preferred_fts_bound_is_reached():
    """Claim 42, that it is tight: 1,000 equally likely responses and labels without noise give 0.19315 to 1e-5."""
    ref = torch.full((1000,), 1e-3, dtype=torch.float64).log()
    optimum = tabular.preferred_ft(ref, tabular.preferences(1e3 * torch.arange(1000, dtype=torch.float64)))
    assert world.kl(optimum, ref).item() == pytest.approx(math.log(2) - 0.5, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_unlikelihood_is_unbounded_where_a_response_loses_often(alpha):
    """Claim 43. -log pi(y_w) + alpha log pi(y_l) in expectation is -sum_y (p_w(y) - alpha p_l(y)) log pi(y): unbounded below
    if and only if some y has p_w(y) < alpha p_l(y). Where none has, the minimum is at pi ~ p_w - alpha p_l; where one has,
    driving its probability to 0 lowers the loss without end: why Unlikelihood's text falls apart."""
    ref = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)
    for strength in (0.05, 3.0):                     # faint preferences, and strong ones
        reward = strength * vector(-1, 0, 0.5, 1)
        p = tabular.preferences(reward)
        won = tabular.preferred_ft(ref, p).exp()                                                      # p_w
        lost = tabular.preferred_ft(ref, p.T).exp()                                                   # p_l
        left = won - alpha * lost
        loss = lambda logps: -(won * logps).sum() + alpha * (lost * logps).sum()
        if left.min() >= 0:
            found = torch.log_softmax(tabular.minimise(lambda theta: loss(torch.log_softmax(theta, -1)), ref), -1)
            assert tabular.total_variation(found, (left / left.sum()).log()) < 1e-6
        else:
            worst = torch.zeros(4, dtype=torch.float64)
            values = []
            for fall in (0.0, 100.0, 1000.0):
                worst[left.argmin()] = -fall
                values.append(loss(torch.log_softmax(worst, -1)).item())
            assert values[0] > values[1] > values[2] + 800 * -left.min().item()
    assert (won - alpha * lost).min() < 0 or alpha < 0.5, "strong preferences must show the unbounded side"
