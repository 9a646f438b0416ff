"""What DPO is compared with: best-of-N, Preferred-FT and Unlikelihood (section 6). float64, 1e-10
unless stated."""
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import world
from lab import tabular
from tools import assert_same, vector, worlds


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("reward", [[1.5, -0.3, 0.2, -2.0, 0.9], [1.0, 1.0, 0.2, -2.0, 0.2]],
                         ids=["distinct", "ties"])
def test_best_of_n_by_listing_every_draw(n, reward):
    """Claim 39, the distribution. F^N - F_-^N, compared with all 5^N draws of N responses.

    Of each draw the best response is taken. Of several best ones, one is taken at random. To 1e-12.
    """
    ref = torch.log_softmax(torch.randn(5, dtype=torch.float64), -1)
    p = [0.0] * 5
    for draw in itertools.product(range(5), repeat=n):
        chance = math.prod(ref[y].exp().item() for y in draw)
        highest = max(reward[y] for y in draw)
        best = [y for y in draw if reward[y] == highest]
        for y in best:
            p[y] += chance / len(best)
    assert_same(tabular.best_of_n(ref, vector(*reward), n).exp(), vector(*p), 1e-12,
                what=f"best of {n}")


@given(worlds(), st.integers(1, 300))
def test_best_of_ns_kl_and_win_rate_are_bounds(drawn, n):
    """Claim 39, the bounds. KL <= log N - (N-1)/N, and the win rate (ties 1/2) <= N/(N+1).

    The exact KL and win rate are compared with these bounds, to 1e-10. They are often quoted as
    equalities. They are reached only when every single response is very unlikely. With a few
    responses both numbers stay well below.
    """
    ref, reward = drawn
    best = tabular.best_of_n(ref, reward, n)
    kl, wins = world.kl(best, ref).item(), world.win_rate(best, ref, reward).item()
    assert kl <= math.log(n) - (n - 1) / n + 1e-10
    assert wins <= n / (n + 1) + 1e-10


def test_best_of_ns_bounds_are_reached_by_many_rare_responses():
    """Claim 39, that the bounds are tight. 20,000 equally likely responses, N = 8.

    Both numbers are within 1e-3 of their bounds. With 3 responses and N = 64, the KL stays 0.5 nats
    below.
    """
    n, ref = 8, torch.full((20_000,), 1 / 20_000, dtype=torch.float64).log()
    reward = torch.arange(20_000, dtype=torch.float64)
    # F is the rank here. tabular.best_of_n compares all pairs, which would need 3 GB.
    p = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
    best = (p ** n - (p - 1 / 20_000) ** n).log()
    kl, wins = world.kl(best, ref).item(), world.win_rate(best, ref, reward).item()
    assert kl == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-3)
    assert wins == pytest.approx(n / (n + 1), abs=1e-3)

    # the formula by rank is that of tabular.best_of_n
    at_most = torch.arange(1, 51, dtype=torch.float64) / 50
    less = torch.arange(50, dtype=torch.float64) / 50
    assert_same(tabular.best_of_n(ref[:50].log_softmax(-1), reward[:50], n).exp(),
                at_most ** n - less ** n, 1e-12, what="F^N - F_-^N")
    few = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    kl = world.kl(tabular.best_of_n(few, vector(0, 1, 2), 64), few)
    assert kl < math.log(64) - 63 / 64 - 0.5


@given(worlds(), st.integers(1, 64))
def test_best_of_n_lies_under_the_frontier(drawn, n):
    """Claim 40. No policy has more reward than the optimum with the same KL. Best-of-N is a policy
    too.

    Its exact reward is compared with that of the optimum whose KL is the same, to 1e-7.
    """
    ref, reward = drawn
    best = tabular.best_of_n(ref, reward, n)
    beta = world.beta_at_kl(ref[None], reward[None], world.kl(best, ref))
    assume(1e-2 < beta < 1e4)  # beyond, the bisection does not meet the KL precisely enough
    star = world.optimal_policy(ref, reward, beta)
    assert world.expected(best, reward) <= world.expected(star, reward) + 1e-7


@pytest.mark.parametrize("spread", [0.3, 1.5, 5.0])
def test_preferred_fts_optimum(spread):
    """Claim 41. Maximum likelihood on chosen responses, with pairs from ref x ref, ends at
    2 ref(y) p(y over ref).

    The formula is compared with a sum over all pairs, to 1e-12. LBFGS on the expected
    log-likelihood ends there too, to a total variation of 1e-7. The method has no beta: nothing can
    tell it how far to go.
    """
    ref, reward = tabular.random_world(4, spread)
    preference, q = tabular.preferences(reward), ref.exp()
    chosen = torch.zeros(4, dtype=torch.float64)  # how often each response is the chosen one
    for i, j in itertools.product(range(4), repeat=2):
        # i is drawn first or second; it is chosen with probability p(i over j)
        chosen[i] += q[i] * q[j] * preference[i, j] + q[j] * q[i] * preference[i, j]

    def negative_log_likelihood(theta):
        return -(chosen * torch.log_softmax(theta, -1)).sum()

    optimum = tabular.preferred_ft(ref, preference)
    assert_same(optimum.exp(), chosen, 1e-12, what="Preferred-FT")
    assert_same(optimum.exp().sum(), vector(1.0)[0], 1e-12, {
        "the 2 is missing. Of each pair, one response is chosen": vector(0.5)[0]},
        what="the sum of its probabilities")
    start = torch.zeros(4, dtype=torch.float64)
    found = torch.log_softmax(tabular.minimise(negative_log_likelihood, start), -1)
    assert tabular.total_variation(found, optimum) < 1e-7


@given(worlds())
def test_preferred_ft_cannot_go_far(drawn):
    """Claim 42. KL(Preferred-FT || ref) <= ln 2 - 1/2 = 0.193 nats, for every reward and every
    reference. The exact KL is compared with this number, to 1e-10."""
    ref, reward = drawn
    optimum = tabular.preferred_ft(ref, tabular.preferences(reward))
    assert world.kl(optimum, ref) <= math.log(2) - 0.5 + 1e-10


def test_preferred_fts_bound_is_reached():
    """Claim 42, that the bound is tight. 1,000 equally likely responses and labels without noise
    give 0.19315 nats, to 1e-5."""
    ref = torch.full((1000,), 1e-3, dtype=torch.float64).log()
    reward = 1e3 * torch.arange(1000, dtype=torch.float64)
    optimum = tabular.preferred_ft(ref, tabular.preferences(reward))
    assert world.kl(optimum, ref).item() == pytest.approx(math.log(2) - 0.5, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_unlikelihood_is_unbounded_where_a_response_loses_often(alpha):
    """Claim 43. The mean of -log pi(y_w) + alpha log pi(y_l) is
    -sum_y (p_w(y) - alpha p_l(y)) log pi(y).

    It is unbounded below if and only if p_w(y) < alpha p_l(y) for some y. If there is no such y,
    the minimum is at pi ~ p_w - alpha p_l: LBFGS ends there, to a total variation of 1e-6. If there
    is one, the loss falls without end as its probability goes to 0: 900 nats further down, it is
    lower by more than 800 (alpha p_l - p_w). So models that are trained so write broken text.
    """
    ref = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)
    for strength in (0.05, 3.0):  # faint preferences, and strong ones
        reward = strength * vector(-1, 0, 0.5, 1)
        preference = tabular.preferences(reward)
        won = tabular.preferred_ft(ref, preference).exp()  # p_w (4,)
        lost = tabular.preferred_ft(ref, preference.T).exp()  # p_l (4,)
        left = won - alpha * lost

        def loss(theta):
            logps = torch.log_softmax(theta, -1)
            return -(won * logps).sum() + alpha * (lost * logps).sum()

        if left.min() >= 0:
            found = torch.log_softmax(tabular.minimise(loss, ref), -1)
            assert tabular.total_variation(found, (left / left.sum()).log()) < 1e-6
        else:
            values = []
            for fall in (0.0, 100.0, 1000.0):
                theta = torch.zeros(4, dtype=torch.float64)
                theta[left.argmin()] = -fall
                values.append(loss(theta).item())
            assert values[0] > values[1] > values[2] + 800 * -left.min().item()
    assert (won - alpha * lost).min() < 0 or alpha < 0.5, (
        "strong preferences must show the unbounded side")
