"""The optimum: what RLHF maximises, the policy that maximises it, and the reward behind a policy (sections 3, 4 and 5).

The oracles are plain Python sums, random policies and finite differences. float64; tolerances are 1e-10 of the largest
value in play unless a test says otherwise.
"""
import math

import pytest
import torch
from hypothesis import given

import tabular
import world
from tools import betas, assert_same, softplus, vector, worlds


@given(worlds(policies=1), betas)
def test_objective_is_beta_log_z_minus_the_kl_to_the_optimum(drawn, beta):
    """Claim 1 (Eq. 4, 11-15). J(pi) = beta log Z - beta KL(pi || pi*) for every pi, by plain sums; so J(pi*) = beta log Z
    and no policy does better. Note -log Z in Eq. 14: A.1's last step circulates with a plus and without the log."""
    ref, reward, pi = drawn
    q, r, p = ref.exp().tolist(), reward.tolist(), pi.exp().tolist()
    top = max(r)
    beta_log_z = beta * math.log(math.fsum(a * math.exp((b - top) / beta) for a, b in zip(q, r))) + top
    # log pi*(y) = log ref(y) + r(y)/beta - log Z, inserted: beta log pi* need not be exponentiated to be summed
    kl_star = math.fsum(a * (beta * (math.log(a) - math.log(b)) - c + beta_log_z) for a, b, c in zip(p, q, r))   # beta KL(pi || pi*)
    assert_same(tabular.objective(pi, ref, reward, beta), vector(beta_log_z - kl_star)[0], 1e-10, what="J(pi)")
    star = world.optimal_policy(ref, reward, beta)
    assert_same(tabular.objective(star, ref, reward, beta), vector(beta_log_z)[0], 1e-10, {
        "E[r] alone: the KL penalty is missing": world.expected(star, reward)}, what="J(pi*)")
    assert kl_star >= -1e-9 * max(1, beta), "a KL is never negative"


@given(worlds(), betas)
def test_the_reward_is_recovered_from_its_optimum(drawn, beta):
    """Claim 2 (Eq. 5). r = beta log(pi*/ref) + beta log Z, for every reward and beta."""
    ref, reward = drawn
    star = world.optimal_policy(ref, reward, beta)
    assert_same(tabular.implicit_reward(star, ref, beta) + beta * world.log_partition(ref, reward, beta), reward, 1e-10,
         {"beta log Z is missing": tabular.implicit_reward(star, ref, beta)}, what="the reward")


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_along_the_frontier_one_more_nat_buys_beta_reward(beta):
    """Claim 3. dE[r]/dKL = beta at pi_beta, and dE[r]/d(1/beta) = Var[r] under pi_beta; by differences of 1e-5, whose
    error is about 1e-9."""
    ref, reward = tabular.random_world(8)
    at = lambda b: world.optimal_policy(ref, reward, b)
    of = lambda b: (world.expected(at(b), reward), world.kl(at(b), ref))
    (up, kl_up), (down, kl_down) = of(beta + 1e-5), of(beta - 1e-5)
    assert_same((up - down) / (kl_up - kl_down), vector(beta)[0], 1e-7, what="dE[r]/dKL")
    mean = world.expected(at(beta), reward)
    variance = world.expected(at(beta), (reward - mean) ** 2)
    up, down = (world.expected(at(1 / (1 / beta + e)), reward) for e in (1e-5, -1e-5))
    assert_same((up - down) / 2e-5, variance, 1e-7, what="dE[r]/d(1/beta)")


@given(worlds())
def test_beta_to_infinity_is_the_reference_and_beta_to_zero_the_best_response(drawn):
    """Claim 4. At beta = 1e9 pi* is ref to 1e-7; at beta = 1e-9 every response worse than the best by 1e-6 has less than
    1e-9, and the best share the mass as ref does: also where ref says nothing (probability 0), which no reward can raise."""
    ref, reward = drawn
    assert_same(world.optimal_policy(ref, reward, 1e9), ref, 1e-7, what="pi* at a large beta")
    reward = (reward * 1e6).round() / 1e6
    ref, reward = torch.cat([ref, vector(-math.inf)]), torch.cat([reward, reward.max()[None] + 5])
    star = world.optimal_policy(ref, reward, 1e-9).exp()
    best = reward == reward[:-1].max()
    assert star[-1] == 0, "pi* left the support of the reference"
    assert star[~best].max() < 1e-9
    assert_same(star[best], (ref[best] - ref[best].logsumexp(0)).exp(), 1e-6, what="pi* among the best")


@given(worlds(), betas, worlds())
def test_a_constant_per_prompt_changes_neither_preferences_nor_the_optimum(drawn, beta, other):
    """Claim 5 (Lemmas 1 and 2). r + f(x) gives the same Bradley-Terry and Plackett-Luce probabilities and the same pi*."""
    ref, reward = drawn
    shifted = reward + other[1][0]
    assert_same(tabular.preferences(shifted), tabular.preferences(reward), 1e-10, what="Bradley-Terry")
    ranking = list(range(len(reward)))
    assert_same(tabular.plackett_luce(shifted, ranking), tabular.plackett_luce(reward, ranking), 1e-10, what="Plackett-Luce")
    assert_same(world.optimal_policy(ref, shifted, beta).exp(), world.optimal_policy(ref, reward, beta).exp(), 1e-8, what="pi*")
    two = reward.clone()
    two[0] += 1.0                                  # a constant for one response only is another reward
    assert (tabular.preferences(two) - tabular.preferences(reward)).abs().max() > 1e-9


@given(worlds(policies=1), betas)
def test_every_class_of_rewards_has_one_implicit_reward(drawn, beta):
    """Claim 6 (Eq. 8 and 9, Theorem 1). f(r) = r - beta log Z is idempotent, the same for all of r's class, and equals
    beta log(pi_r/ref); and sum_y ref exp(r^/beta) = 1 for the implicit reward of any policy, optimal or not."""
    ref, reward, pi = drawn
    projected = tabular.project(ref, reward, beta)
    assert_same(tabular.project(ref, projected, beta), projected, 1e-10, what="f(f(r))")
    assert_same(tabular.project(ref, reward + 3.7, beta), projected, 1e-10, {"r + f(x) has another projection": projected + 3.7},
         what="f(r + 3.7)")
    assert_same(projected, tabular.implicit_reward(world.optimal_policy(ref, reward, beta), ref, beta), 1e-10, what="f(r)")
    assert_same(world.partition(ref, tabular.implicit_reward(pi, ref, beta), beta), vector(1.0)[0], 1e-10, what="Eq. 9's sum")


@given(worlds(), betas)
def test_advantages_vanish_at_the_optimum(drawn, beta):
    """Claim 7 (section 5.2). At pi*, r - beta log(pi*/ref) - beta log Z = 0 for every y: the "reward" of the policy gradient
    is one and the same for all responses, so with the right baseline its variance is zero. Away from pi* it is not."""
    ref, reward = drawn
    advantage = lambda logps: reward - tabular.implicit_reward(logps, ref, beta) - beta * world.log_partition(ref, reward, beta)
    assert_same(advantage(world.optimal_policy(ref, reward, beta)), torch.zeros_like(reward), 1e-10 * max(1, reward.abs().max().item()),
         what="the advantage at pi*")
    spread = reward.max() - reward.min()
    assert advantage(ref).max() - advantage(ref).min() >= spread - 1e-10 * max(1, beta), "at the reference all of r is left"


def test_z_cancels_only_between_responses_to_one_prompt():
    """Eq. 6. Two prompts with different Z: within a prompt the difference of implicit rewards is that of the true ones, so
    Bradley-Terry needs no Z; across prompts it is off by beta (log Z - log Z'), so a pair must share its prompt."""
    beta = 0.7
    (ref, reward), (other_ref, other_reward) = tabular.random_world(5), tabular.random_world(5)
    other_reward = other_reward + 3                    # a friendlier prompt: whatever is answered is worth more
    mine = tabular.implicit_reward(world.optimal_policy(ref, reward, beta), ref, beta)
    other = tabular.implicit_reward(world.optimal_policy(other_ref, other_reward, beta), other_ref, beta)
    assert_same(torch.exp(-softplus(-(mine[0] - mine[1]))), torch.sigmoid(reward[0] - reward[1]), 1e-12, what="p within a prompt")
    z, other_z = (sum(q * math.exp(r / beta) for q, r in zip(a.exp().tolist(), b.tolist()))
                  for a, b in ((ref, reward), (other_ref, other_reward)))
    assert_same(mine[0] - other[0], reward[0] - other_reward[0] - beta * math.log(z / other_z), 1e-12,
         {"Z was supposed not to cancel here": reward[0] - other_reward[0]}, what="r^ across prompts")
