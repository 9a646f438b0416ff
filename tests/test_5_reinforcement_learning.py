"""Reinforcement learning on the same objective: the policy gradient and its baselines, estimates of
the KL, mirror descent.

Every expectation is a sum over all responses. Every gradient with respect to the logits of a
tabular policy is compared with autograd of the exact quantity. float64, 1e-10 unless stated. Claims
33 to 35 are about the functions of ppo.py. The last test is one real PPO step of a tiny GPT,
compared with the exact gradient of J over all texts that the GPT can write.
"""
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import dpo
import ppo
import rlhf
import world
from lab import tabular
from model import GPT, GPTConfig
from tools import assert_same, betas, numbers, vector, worlds


def power_of_ten(exponent):
    return 10 ** exponent


def exact_gradient(f, logits):
    """The gradient of f(log-probabilities) with respect to the logits, by autograd."""
    theta = logits.clone().requires_grad_()
    return torch.autograd.grad(f(torch.log_softmax(theta, -1)), theta)[0]


def score(logps):
    """grad log pi(y) with respect to the logits, for all y: row y is e_y - pi. (N, N)"""
    return torch.eye(len(logps), dtype=torch.float64) - logps.exp()


@given(worlds(policies=1), betas, st.floats(-30, 30))
def test_the_policy_gradient_with_any_baseline(drawn, beta, baseline):
    """Claim 31. grad J = E_pi[(r - beta log(pi/ref) - b) grad log pi], for any baseline b.

    The gradient of the KL needs no term of its own, and b changes only the variance. The sum over
    all responses is compared with autograd of the exact J, to 1e-11 of the largest advantage.
    """
    ref, reward, pi = drawn
    advantage = reward - tabular.implicit_reward(pi, ref, beta) - baseline  # (N,)
    estimate = (pi.exp() * advantage) @ score(pi)

    def objective(logps):
        return tabular.objective(logps, ref, reward, beta)

    tolerance = 1e-11 * max(1, advantage.abs().max().item())
    assert_same(estimate, exact_gradient(objective, pi), tolerance, {
        "the KL penalty is missing in the reward": (pi.exp() * (reward - baseline)) @ score(pi)},
        what="the policy gradient")


@given(worlds(policies=1))
def test_kl_estimators_and_their_gradients(drawn):
    """Claim 32. On samples of pi, E k1 = E k3 = KL(pi || ref), while E k2 is another number.

    As losses they behave differently: E grad k1 = 0, E grad k2 = grad KL(pi || ref), and
    E grad k3 = grad KL(ref || pi). So a good estimate of a KL is not always a good loss. The means
    are compared with a plain sum, the gradients with autograd of the exact KL, to 1e-10.
    """
    ref, _, pi = drawn
    p = pi.exp()
    k1, k2, k3 = tabular.kl_estimators(pi, ref)
    kl = math.fsum(a * (b - c) for a, b, c in zip(p.tolist(), pi.tolist(), ref.tolist()))
    assert_same((p * k1).sum(), vector(kl)[0], 1e-10, what="E k1")
    assert_same((p * k3).sum(), vector(kl)[0], 1e-10, {
        "the k1 in k3 has the wrong sign": (p * (k3 - 2 * k1)).sum()}, what="E k3")
    assert (k3 >= -1e-12).all(), "k3 is never negative, whatever the sample"

    def expected_gradient(k):
        """E_{y ~ pi}[grad k(y)]. The sampling itself is not differentiated."""
        return exact_gradient(lambda logps: (p * tabular.kl_estimators(logps, ref)[k]).sum(), pi)

    to_ref = exact_gradient(lambda logps: world.kl(logps, ref), pi)
    from_ref = exact_gradient(lambda logps: world.kl(ref, logps), pi)
    largest_ratio = max(1.0, (ref - pi).exp().max().item())  # k3 contains ref/pi, up to e^20
    assert_same(expected_gradient(0), torch.zeros_like(pi), 1e-12, what="E grad k1")
    assert_same(expected_gradient(1), to_ref, 1e-10, what="E grad k2")
    assert_same(expected_gradient(2), from_ref, 1e-14 * largest_ratio + 1e-10, {
        "this is grad KL(pi || ref)": to_ref}, what="E grad k3")


def test_k2_is_biased():
    """Claim 32, the other half. For one policy E k2 is computed by hand, and it is not the KL.

    pi = (3/4, 1/4), ref = (1/2, 1/2). The two agree to 1e-12.
    """
    pi, ref = vector(3 / 4, 1 / 4).log(), vector(1 / 2, 1 / 2).log()
    a, b = math.log(3 / 2), math.log(1 / 2)
    _, k2, _ = tabular.kl_estimators(pi, ref)
    mean = (pi.exp() * k2).sum()
    assert_same(mean, vector((3 * a * a + b * b) / 8)[0], 1e-12, {
        "the half is missing": vector((3 * a * a + b * b) / 4)[0]}, what="E k2")
    assert abs(mean - world.kl(pi, ref)) > 1e-3, "here E k2 must not be the KL"


@given(worlds(), betas, st.lists(st.floats(0.05, 1), min_size=1, max_size=6), st.floats(-5, 5))
def test_mirror_descent_from_the_reference_lands_on_the_optimum(drawn, beta, steps, baseline):
    """Claim 36 (MDPO, https://arxiv.org/abs/2005.09814). A step multiplies the policy by exp(t A).

    A is any advantage. From ref, with steps that add up to 1/beta, the policy lands exactly on pi*.
    The number of steps does not matter. So stopping early is a KL penalty. The two policies are
    compared to 1e-9 (1e-9/beta for beta < 1).
    """
    ref, reward = drawn
    logps = ref
    for share in steps:
        logps = tabular.mirror_step(logps, reward - baseline, share / sum(steps) / beta)
    assert_same(logps.exp(), world.optimal_policy(ref, reward, beta).exp(),
                1e-9 * max(1, 1 / beta), what="the policy after the last step")


@given(worlds(policies=1), st.floats(-1, 1).map(power_of_ten), st.floats(-2, 1).map(power_of_ten))
def test_a_mirror_step_maximises_what_it_says(drawn, beta, t):
    """The step is the maximiser of E[A] - beta KL(pi || ref) - KL(pi || current)/t.

    At it the gradient of this value is zero (1e-9), and random policies have a lower value.
    """
    ref, reward, pi = drawn

    def value(logps):
        return tabular.objective(logps, ref, reward, beta) - world.kl(logps, pi) / t

    after = tabular.mirror_step(pi, reward, t, ref, beta)
    tolerance = 1e-9 * max(1, 1 / t, beta)
    assert exact_gradient(value, after).abs().max() < tolerance
    assert value(pi) <= value(after) + tolerance
    assert value(ref) <= value(after) + tolerance


@given(worlds(policies=1), betas, st.floats(-3, 2).map(power_of_ten))
def test_mirror_descent_with_a_kl_contracts(drawn, beta, t):
    """Claim 37. The step contains -beta KL(pi || ref). Then the centred log-ratio to pi* shrinks by
    exactly 1/(1 + beta t) in each step, from any policy.

    The log-ratio after a step is compared with the one before it, to 1e-9 (1e-9/beta for beta < 1).
    """
    ref, reward, pi = drawn
    star = world.optimal_policy(ref, reward, beta)

    def centred(logps):
        return (logps - star) - (logps - star).mean()

    after = tabular.mirror_step(pi, reward, t, ref, beta)
    assert_same(centred(after), centred(pi) / (1 + beta * t), 1e-9 * max(1, 1 / beta), {
        "no contraction: the step lacks the KL to the reference": centred(pi)},
        what="the distance to pi*")


@given(worlds(policies=1), st.floats(-2, 1).map(power_of_ten))
def test_the_first_mirror_step_is_the_policy_gradient(drawn, t):
    """Claim 38. At pi = pi_k the KL between the two has no gradient.

    So the first gradient step on MDPO's objective E_{pi_k}[pi/pi_k A] - KL(pi || pi_k)/t is the
    policy gradient, for every t. The step, by autograd, is compared with a sum over all responses,
    to 1e-10 (1e-10/t for t < 1).
    """
    ref, reward, pi = drawn

    def kl_to_current(logps):
        return world.kl(logps, pi)

    def surrogate(logps):
        gain = ((logps - pi).exp() * (pi.exp() * reward)).sum()
        return gain - kl_to_current(logps) / t

    assert_same(exact_gradient(surrogate, pi), (pi.exp() * reward) @ score(pi),
                1e-10 * max(1, 1 / t), what="the first step")
    assert exact_gradient(kl_to_current, pi).abs().max() < 1e-12
    moved = torch.log_softmax(pi + torch.linspace(0, 1, len(pi), dtype=torch.float64), -1)
    assume((moved - pi).abs().max() > 1e-3)
    assert exact_gradient(kl_to_current, moved).abs().max() > 0, (
        "after the first step the KL must have a gradient")


# ---- PPO, GAE and REINFORCE++: the functions of ppo.py

@given(numbers(6, 5), numbers(6, 3), st.sampled_from([0.1, 0.2, 0.5]))
def test_ppos_gradient_at_ratio_1_is_the_policy_gradient(drawn, advantage, clip):
    """Claim 33, first half. At pi = pi_old the loss of every token has the gradient
    -A grad log pi, with and without the clip, and its value is -A. Outside the mask both are 0.
    Autograd is compared with this, to 1e-12."""
    old, mask = drawn.view(2, 3), torch.tensor([[True, True, False], [True, True, True]])
    logps, everywhere = old.clone().requires_grad_(), advantage.view(2, 3)
    advantage = everywhere * mask
    for limit in (clip, None):
        loss = ppo.ppo_loss(logps, old, everywhere, mask, limit)
        assert_same(loss.detach(), -advantage.sum() / 2, 1e-12, what="the loss at ratio 1")
        gradient = torch.autograd.grad(loss, logps)[0]
        assert_same(gradient, -advantage / 2, 1e-12, {
            "the sign is flipped. The loss is minus the gain": advantage / 2,
            "this is a sum over responses; wanted their mean": -advantage,
            "this is a mean over tokens. J is a sum over the tokens of a response": -advantage / 5,
        }, what="the gradient at ratio 1")


@given(st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3), st.floats(-1.5, 1.5),
       st.sampled_from([0.1, 0.2, 0.5]))
def test_ppos_gradient_is_zero_where_the_policy_has_gone_far_enough(advantage, log_ratio, clip):
    """Claim 33, second half. For A > 0 the gradient is 0 beyond rho = 1 + clip. For A < 0 it is 0
    below rho = 1 - clip.

    Everywhere else it is -rho A. This includes policies that went far in the wrong direction, so
    that they can come back. Autograd is compared with this, to 1e-12.
    """
    ratio = math.exp(log_ratio)
    assume(min(abs(ratio - 1 - clip), abs(ratio - 1 + clip)) > 1e-6)  # no gradient at the kink
    logps, zero = vector(log_ratio).view(1, 1).requires_grad_(), torch.zeros(1, 1).double()
    mask = torch.ones(1, 1).bool()
    loss = ppo.ppo_loss(logps, zero, vector(advantage).view(1, 1), mask, clip)
    gradient = torch.autograd.grad(loss, logps)[0] if loss.requires_grad else zero
    far_enough = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    unclipped = vector(-ratio * advantage).view(1, 1)
    assert_same(gradient, zero if far_enough else unclipped, 1e-12, {
        "nothing is clipped": unclipped,
        "it is clipped on both sides. PPO takes the minimum of the clipped and the unclipped gain, "
        "so that a policy that went too far in the wrong direction still has a gradient": zero,
    }, what=f"the gradient at ratio {ratio:.3f}, A = {advantage:.3f}")


@st.composite
def trajectories(draw):
    """(rewards, values, mask), each (3,5). Prompts and responses have different lengths. Outside
    the mask stand arbitrary numbers."""
    start = draw(st.lists(st.integers(0, 2), min_size=3, max_size=3))
    length = draw(st.lists(st.integers(1, 3), min_size=3, max_size=3))
    position = torch.arange(5)
    mask = torch.stack([(position >= s) & (position < s + n) for s, n in zip(start, length)])
    return draw(numbers(15, 5)).view(3, 5), draw(numbers(15, 5)).view(3, 5), mask


@given(trajectories(), st.floats(0.5, 1))
def test_gae_between_the_td_error_and_the_return(drawn, gamma):
    """Claim 34. With lambda = 0, GAE is r + gamma V' - V, where V' = 0 after the last token.

    With lambda = gamma = 1 it is the sum of all rewards to come, minus V. In between it is the
    exponentially weighted sum of TD errors (1506.02438, Eq. 16). All three are added up here term
    by term, and compared to 1e-12.
    """
    rewards, values, mask = drawn
    td = torch.zeros(3, 5).double()  # (B, S), as the two below
    weighted, to_go = torch.zeros_like(td), torch.zeros_like(td)
    for b in range(3):
        inside = mask[b].nonzero().flatten().tolist()
        for i, t in enumerate(inside):
            next_value = values[b, inside[i + 1]] if i + 1 < len(inside) else 0.0
            td[b, t] = rewards[b, t] + gamma * next_value - values[b, t]
            to_go[b, t] = math.fsum(rewards[b, u].item() for u in inside[i:]) - values[b, t]
        for i, t in enumerate(inside):
            weighted[b, t] = sum((gamma * 0.7) ** k * td[b, u] for k, u in enumerate(inside[i:]))
    assert_same(ppo.gae(rewards, values, mask, gamma, 0.0), td, 1e-12, what="GAE at lambda = 0")
    assert_same(ppo.gae(rewards, values, mask, gamma, 0.7), weighted, 1e-12,
                what="GAE at lambda = 0.7")
    assert_same(ppo.gae(rewards, values, mask, 1.0, 1.0), to_go, 1e-12, {
        "the value is not subtracted": torch.where(mask, to_go + values, 0.0)},
        what="GAE at lambda = gamma = 1")


@given(trajectories(), numbers(15, 3), numbers(3, 5), betas)
def test_reward_to_go_is_reinforce_plus_plus_advantage(drawn, other, scores, beta):
    """Claim 35. The rewards are -beta log(pi/ref) at each token, and the score at EOS. gamma = 1.

    What is still to come of them is REINFORCE++'s advantage of a token before it is normalised,
    r - beta sum_{u >= t} log(pi_u/ref_u) (2501.03262). From the first token on it is
    r - beta log(pi/ref) of the whole response, whose expectation is J. It also is GAE with V = 0
    and lambda = 1. All are compared, the first with plain sums, to 1e-12 (1e-12 beta for beta > 1).
    """
    logps, ref_logps, mask = drawn[0], other.view(3, 5), drawn[2]
    rewards = ppo.token_rewards(scores, logps, ref_logps, mask, beta)
    k1, want = torch.where(mask, logps - ref_logps, 0.0), torch.zeros(3, 5).double()
    for b in range(3):
        for t in mask[b].nonzero().flatten().tolist():
            want[b, t] = scores[b] - beta * math.fsum(k1[b, t:].tolist())
    assert not rewards[~mask].any(), "outside of the response there are no rewards"
    got = ppo.reward_to_go(torch.where(mask, rewards, drawn[1]), mask)  # outside it reads nothing
    tolerance = 1e-12 * max(1, beta)
    k1_to_go = k1.flip(1).cumsum(1).flip(1)
    assert_same(got, want, tolerance, {
        "beta is missing": torch.where(mask, scores[:, None] - k1_to_go, 0.0),
        "the KL is added, but it is a penalty":
            torch.where(mask, 2 * scores[:, None] - want, 0.0),
    }, what="the advantage")
    zero = torch.zeros(3, 5).double()
    assert_same(got, ppo.gae(rewards, zero, mask, 1.0, 1.0), tolerance,
                what="reward to go, compared with GAE without a critic,")
    first = torch.stack([got[b, mask[b].nonzero()[0, 0]] for b in range(3)])
    assert_same(first, scores - beta * k1.sum(-1), tolerance,
                what="the advantage of the whole response")


def test_value_loss_and_its_clip_by_hand():
    """Without a clip: (1 - 3)^2 and (2 - 2)^2, halved and averaged. With clip 0.5 the first value,
    which came from 0, gains by moving to 0.5 only: (0.5 - 3)^2. Outside the mask nothing counts."""
    values, old = vector(1, 2, 9)[None], vector(0, 2, 0)[None]
    returns, mask = vector(3, 2, -9)[None], torch.tensor([[True, True, False]])
    assert_same(ppo.value_loss(values, old, returns, mask), vector(1.0)[0], 1e-12,
                {"the half is missing": vector(2.0)[0]}, what="the critic's loss")
    assert_same(ppo.value_loss(values, old, returns, mask, clip=0.5), vector(6.25 / 4)[0], 1e-12,
                {"not clipped": vector(1.0)[0]}, what="the critic's clipped loss")


@given(trajectories(), st.sampled_from([1.0, 1e-8]))
def test_normalised_advantages(drawn, scale):
    """The mean is subtracted. Then comes the division by the deviation plus 1e-8: advantages that
    differ by no more than rounding stay small. To 1e-6; outside the mask all is 0."""
    advantages, _, mask = drawn
    got = ppo.normalise(scale * advantages, mask)
    inside = [scale * a for a in advantages[mask].tolist()]
    mean = math.fsum(inside) / len(inside)
    deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in inside) / (len(inside) - 1))
    want = torch.where(mask, (scale * advantages - mean) / (deviation + 1e-8), 0.0)
    assert_same(got, want, 1e-6, {"1e-8 is missing": ppo.normalise(1e6 * advantages, mask)},
                what="the normalised advantages")


def all_texts(vocab, longest):
    """Every response over a vocabulary whose token 0 is EOS: those that end in EOS, and those that
    are cut off at the longest length."""
    texts, growing = [], [[]]
    for n in range(longest):
        grown = []
        for text in growing:
            grown += [text + [token] for token in range(vocab)]
        texts += [t for t in grown if t[-1] == 0]
        growing = [t for t in grown if t[-1] != 0]
    return texts + growing


@pytest.fixture
def small_language():
    """A tiny policy and a reference over 4 tokens, all 85 texts of at most 4 tokens after one
    prompt of 2 tokens, and a score for each."""
    torch.manual_seed(5)
    config = GPTConfig(block_size=6, vocab_size=4, n_layer=1, n_head=2, n_embd=8)
    policy = GPT(config).double()
    reference = GPT(config).double()
    texts = all_texts(4, 4)
    rows = torch.tensor([[1, 2] + t + [0] * (4 - len(t)) for t in texts])  # (N, T)
    lengths = torch.tensor([len(t) for t in texts])[:, None]
    predicts = torch.arange(5)  # entry 0 predicts the second token of the prompt
    mask = (predicts >= 1) & (predicts < 1 + lengths)  # (N, S)
    return policy, reference, rows, mask, torch.randn(len(texts), dtype=torch.float64)


def flat_gradient(value, policy):
    gradient = torch.autograd.grad(value, list(policy.parameters()))
    return torch.cat([g.flatten() for g in gradient])


def whole_logps(token_logps, mask):
    """The log-probabilities of whole responses. (N, S) -> (N,)"""
    return torch.where(mask, token_logps, 0.0).sum(-1)


@pytest.mark.parametrize("critic", [False, True],
                         ids=["reward to go", "gae, lambda = 1, any critic"])
def test_one_ppo_step_is_the_exact_gradient_of_j(small_language, critic):
    """Claim 33, the whole step, which uses claims 31 and 35. The PPO loss at ratio 1 has a gradient
    for every text that a tiny GPT can write.

    Weighted with the probabilities of the texts, these gradients sum to minus the gradient of the
    exact J = sum_y pi (r - beta log(pi/ref)), to 1e-9. This is also true with a critic that is
    wrong everywhere: at lambda = 1 a critic is only a baseline. And 20,000 sampled texts give the
    gradient within 3 standard errors, for its projections on 8 random directions, fixed before.
    """
    policy, reference, rows, mask, scores = small_language
    beta = 0.3
    logps = dpo.token_logps(policy(rows), rows)  # (N, S)
    ref_logps = dpo.token_logps(reference(rows), rows).detach()  # (N, S)
    whole, ref_whole = whole_logps(logps, mask), whole_logps(ref_logps, mask)  # (N,), (N,)
    assert_same(whole.exp().sum(), vector(1.0)[0], 1e-12, what="the probability of all texts")
    j = (whole.exp() * (scores - beta * (whole - ref_whole))).sum()
    exact = flat_gradient(j, policy)

    with torch.no_grad():
        rewards = ppo.token_rewards(scores, logps, ref_logps, mask, beta)
        values = rlhf.ScalarModel(policy).double()
        torch.nn.init.normal_(values.scalar.weight)
        if critic:
            advantages = ppo.gae(rewards, values(rows)[:, :-1], mask, 1.0, 1.0)
        else:
            advantages = ppo.reward_to_go(rewards, mask)
    each = []  # minus the gradient of the PPO loss of each text alone
    for i in range(len(rows)):
        one = slice(i, i + 1)
        logp = dpo.token_logps(policy(rows[one]), rows[one])
        loss = ppo.ppo_loss(logp, logp.detach(), advantages[one], mask[one], clip=0.2)
        each.append(-flat_gradient(loss, policy))
    each, p = torch.stack(each), whole.exp().detach()  # (N, P), (N,)
    again = whole_logps(dpo.token_logps(policy(rows), rows), mask)
    assert_same(p @ each, exact, 1e-9, {
        "the KL penalty is missing": flat_gradient((again.exp() * scores).sum(), policy),
        "the sign is flipped": -exact}, what="the expected PPO gradient")

    g = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(p, 20_000, replacement=True, generator=g)
    directions = torch.randn(each.size(1), 8, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=0)
    sampled = each[drawn] @ directions  # (20000, 8)
    standard_error = sampled.std(0) / math.sqrt(len(drawn))
    error = (sampled.mean(0) - exact @ directions) / standard_error
    assert error.abs().max() < 3, f"the errors, in standard errors, are {error.tolist()}"
