"""The optimum: what RLHF maximises, the policy that maximises it, and the reward that a policy is
optimal for (sections 3, 4 and 5).

Each result is compared with plain Python sums, random policies or finite differences. float64. The
tolerance is 1e-10 of the largest value in play unless a test says otherwise.
"""
import math

import pytest
import torch
from hypothesis import given

import world
from lab import tabular
from tools import assert_same, betas, softplus, vector, worlds


@given(worlds(policies=1), betas)
def test_objective_is_beta_log_z_minus_the_kl_to_the_optimum(drawn, beta):
    """Claim 1 (Eq. 4, 11-15). J(pi) = beta log Z - beta KL(pi || pi*) for every pi.

    So J(pi*) = beta log Z, and no policy does better. The J of the code is compared with plain sums
    over the responses, to 1e-10. Eq. 14 ends in -log Z. Some copies of the paper print this last
    step of A.1 with a plus and without the log.
    """
    ref, reward, pi = drawn
    q, r, p = ref.exp().tolist(), reward.tolist(), pi.exp().tolist()
    top = max(r)
    z = math.fsum(a * math.exp((b - top) / beta) for a, b in zip(q, r))
    beta_log_z = beta * math.log(z) + top
    # beta KL(pi || pi*), where log pi*(y) = log ref(y) + r(y)/beta - log Z is inserted. So
    # pi*(y) itself is never needed: at a small beta it is too small for a float.
    terms = []
    for a, b, c in zip(p, q, r):
        terms.append(a * (beta * (math.log(a) - math.log(b)) - c + beta_log_z))
    kl_star = math.fsum(terms)
    assert_same(tabular.objective(pi, ref, reward, beta), vector(beta_log_z - kl_star)[0], 1e-10,
                what="J(pi)")
    star = world.optimal_policy(ref, reward, beta)
    assert_same(tabular.objective(star, ref, reward, beta), vector(beta_log_z)[0], 1e-10, {
        "this is E[r] alone, without the KL penalty": world.expected(star, reward)}, what="J(pi*)")
    assert kl_star >= -1e-9 * max(1, beta), f"a KL is never negative, but this one is {kl_star:g}"


@given(worlds(), betas)
def test_the_reward_is_recovered_from_its_optimum(drawn, beta):
    """Claim 2 (Eq. 5). r = beta log(pi*/ref) + beta log Z, for every reward and beta.

    The right side, which is computed from pi*, is compared with the reward itself, to 1e-10.
    """
    ref, reward = drawn
    star = world.optimal_policy(ref, reward, beta)
    implicit = tabular.implicit_reward(star, ref, beta)
    beta_log_z = beta * world.log_partition(ref, reward, beta)
    assert_same(implicit + beta_log_z, reward, 1e-10, {"beta log Z is missing": implicit},
                what="the reward")


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_along_the_frontier_one_more_nat_buys_beta_reward(beta):
    """Claim 3. dE[r]/dKL = beta at pi_beta, and dE[r]/d(1/beta) = Var[r] under pi_beta.

    The derivatives are differences over steps of 1e-5, with errors of about 1e-9. They are compared
    with beta and with the variance, to 1e-7.
    """
    ref, reward = tabular.random_world(8)

    def optimum_at(b):
        return world.optimal_policy(ref, reward, b)

    def reward_and_kl(b):
        return world.expected(optimum_at(b), reward), world.kl(optimum_at(b), ref)

    up, kl_up = reward_and_kl(beta + 1e-5)
    down, kl_down = reward_and_kl(beta - 1e-5)
    assert_same((up - down) / (kl_up - kl_down), vector(beta)[0], 1e-7, what="dE[r]/dKL")

    mean = world.expected(optimum_at(beta), reward)
    variance = world.expected(optimum_at(beta), (reward - mean) ** 2)
    up = world.expected(optimum_at(1 / (1 / beta + 1e-5)), reward)
    down = world.expected(optimum_at(1 / (1 / beta - 1e-5)), reward)
    assert_same((up - down) / 2e-5, variance, 1e-7, what="dE[r]/d(1/beta)")


@given(worlds())
def test_beta_to_infinity_is_the_reference_and_beta_to_zero_the_best_response(drawn):
    """Claim 4. A huge beta leaves the reference as it is. A tiny beta keeps the best responses.

    At beta = 1e9, pi* is ref to 1e-7. At beta = 1e-9, every response that is worse than the best
    one by 1e-6 has a probability below 1e-9. The best responses share the mass in the proportions
    of ref (1e-6). A response to which ref gives probability 0 keeps it, whatever its reward.
    """
    ref, reward = drawn
    assert_same(world.optimal_policy(ref, reward, 1e9), ref, 1e-7, what="pi* at a large beta")
    reward = (reward * 1e6).round() / 1e6
    # one more response, with the highest reward, which the reference never writes
    ref = torch.cat([ref, vector(-math.inf)])
    reward = torch.cat([reward, reward.max()[None] + 5])
    star = world.optimal_policy(ref, reward, 1e-9).exp()
    best = reward == reward[:-1].max()
    assert star[-1] == 0, "pi* writes a response to which the reference gives probability 0"
    assert star[~best].max() < 1e-9, "a response that is not the best keeps some probability"
    assert_same(star[best], (ref[best] - ref[best].logsumexp(0)).exp(), 1e-6,
                what="pi* among the best responses")


@given(worlds(), betas, worlds())
def test_a_constant_per_prompt_changes_neither_preferences_nor_the_optimum(drawn, beta, other):
    """Claim 5 (Lemmas 1 and 2). r + f(x) has the same Bradley-Terry probabilities as r, the same
    Plackett-Luce probabilities, and the same pi*.

    The results for r + f(x) are compared with those for r: to 1e-10, and pi* to 1e-8.
    """
    ref, reward = drawn
    shifted = reward + other[1][0]
    assert_same(tabular.preferences(shifted), tabular.preferences(reward), 1e-10,
                what="Bradley-Terry")
    ranking = list(range(len(reward)))
    assert_same(tabular.plackett_luce(shifted, ranking), tabular.plackett_luce(reward, ranking),
                1e-10, what="Plackett-Luce")
    assert_same(world.optimal_policy(ref, shifted, beta).exp(),
                world.optimal_policy(ref, reward, beta).exp(), 1e-8, what="pi*")
    # a constant for one response alone is another reward
    other_reward = reward.clone()
    other_reward[0] += 1.0
    difference = (tabular.preferences(other_reward) - tabular.preferences(reward)).abs().max()
    assert difference > 1e-9, "one reward was raised by 1 and no preference changed"


@given(worlds(policies=1), betas)
def test_every_class_of_rewards_has_one_implicit_reward(drawn, beta):
    """Claim 6 (Eq. 8 and 9, Theorem 1). f(r) = r - beta log Z is the implicit reward of r's class.

    f applied twice is f applied once. f is the same for r and for r + f(x), and it equals
    beta log(pi_r/ref). And sum_y ref exp(r^/beta) = 1 for the implicit reward r^ of any policy,
    optimal or not. Each of these equations is checked to 1e-10.
    """
    ref, reward, pi = drawn
    projected = tabular.project(ref, reward, beta)
    assert_same(tabular.project(ref, projected, beta), projected, 1e-10, what="f(f(r))")
    assert_same(tabular.project(ref, reward + 3.7, beta), projected, 1e-10, {
        "the constant is still there, but f removes it": projected + 3.7}, what="f(r + 3.7)")
    star = world.optimal_policy(ref, reward, beta)
    assert_same(projected, tabular.implicit_reward(star, ref, beta), 1e-10, what="f(r)")
    assert_same(world.partition(ref, tabular.implicit_reward(pi, ref, beta), beta), vector(1.0)[0],
                1e-10, what="the sum of Eq. 9")


@given(worlds(), betas)
def test_advantages_vanish_at_the_optimum(drawn, beta):
    """Claim 7 (section 5.2). At pi*, r - beta log(pi*/ref) - beta log Z = 0 for every y.

    It is compared with zeros, to 1e-10 of the largest reward. So the "reward" of the policy
    gradient is the same number for all responses, and with the right baseline its variance is zero.
    Away from pi* the variance is not zero.
    """
    ref, reward = drawn

    def advantage(logps):
        implicit = tabular.implicit_reward(logps, ref, beta)
        return reward - implicit - beta * world.log_partition(ref, reward, beta)

    star = world.optimal_policy(ref, reward, beta)
    tolerance = 1e-10 * max(1, reward.abs().max().item())
    assert_same(advantage(star), torch.zeros_like(reward), tolerance, what="the advantage at pi*")
    spread = reward.max() - reward.min()
    assert advantage(ref).max() - advantage(ref).min() >= spread - 1e-10 * max(1, beta), (
        "at the reference the advantages must differ as much as the rewards do")


def test_several_prompts_at_once_are_each_prompt_alone():
    """A tensor (2, N) is two prompts. J of Eq. 3, f(r) of Eq. 8 and the total variation of each are
    compared with plain sums over its responses, to 1e-12."""
    beta = 0.7
    (ref, reward), (other, other_reward) = tabular.random_world(5), tabular.random_world(5)
    refs, pis = torch.stack([ref, other]), torch.stack([other, ref])  # (2, 5)
    rewards = torch.stack([reward, other_reward])  # (2, 5)
    objectives, projected, variations = [], [], []
    for q, p, r in zip(refs.exp().tolist(), pis.exp().tolist(), rewards.tolist()):
        objectives.append(sum(a * (c - beta * math.log(a / b)) for a, b, c in zip(p, q, r)))
        z = sum(b * math.exp(c / beta) for b, c in zip(q, r))
        projected.append([c - beta * math.log(z) for c in r])
        variations.append(sum(abs(a - b) for a, b in zip(p, q)) / 2)
    assert_same(tabular.objective(pis, refs, rewards, beta), vector(*objectives), 1e-12, what="J")
    assert_same(tabular.project(refs, rewards, beta), torch.tensor(projected, dtype=torch.float64),
                1e-12, what="f(r)")
    assert_same(tabular.total_variation(pis, refs), vector(*variations), 1e-12,
                what="the total variation")


def test_the_rewards_of_random_worlds_spread_as_much_as_asked():
    """The standard deviation of 10,000 rewards is 1.5, or what is asked for, within 4%. That is
    more than five standard errors."""
    assert tabular.random_world(10_000)[1].std().item() == pytest.approx(1.5, rel=0.04)
    assert tabular.random_world(10_000, 5.0)[1].std().item() == pytest.approx(5.0, rel=0.04)


def test_z_cancels_only_between_responses_to_one_prompt():
    """Eq. 6. Z cancels within a prompt. It does not cancel between two prompts.

    Within a prompt, implicit rewards differ as the true rewards do, so Bradley-Terry needs no Z.
    Across two prompts the difference is off by beta (log Z - log Z'). So both responses of a pair
    must answer the same prompt.
    """
    beta = 0.7
    (ref, reward), (other_ref, other_reward) = tabular.random_world(5), tabular.random_world(5)
    other_reward = other_reward + 3  # a friendlier prompt: every answer to it has a higher reward
    mine = tabular.implicit_reward(world.optimal_policy(ref, reward, beta), ref, beta)
    other_star = world.optimal_policy(other_ref, other_reward, beta)
    other = tabular.implicit_reward(other_star, other_ref, beta)
    assert_same(torch.exp(-softplus(-(mine[0] - mine[1]))), torch.sigmoid(reward[0] - reward[1]),
                1e-12, what="the preference within a prompt")

    def partition_by_hand(logps, rewards):
        pairs = zip(logps.exp().tolist(), rewards.tolist())
        return sum(q * math.exp(r / beta) for q, r in pairs)

    z = partition_by_hand(ref, reward)
    other_z = partition_by_hand(other_ref, other_reward)
    want = reward[0] - other_reward[0] - beta * math.log(z / other_z)
    assert_same(mine[0] - other[0], want, 1e-12, {
        "Z has cancelled, but between two prompts it must not": reward[0] - other_reward[0]},
        what="the difference of r^ across prompts")
