"""Reinforcement learning on the same objective: the policy gradient and its baselines, estimates of the KL, mirror descent.
Every expectation is a sum over all responses, and every gradient with respect to the logits of a tabular policy is compared
with autograd of the exact quantity. float64, 1e-10 unless stated. Claims 33 to 35 are about the functions of rlhf.py, and end
in the gradient of one real PPO step of a tiny GPT, against the exact gradient of J over all texts that it can write."""
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import dpo
import rlhf
import tabular
import world
from model import GPT, GPTConfig
from tools import assert_same, betas, numbers, vector, worlds


def exact_gradient(f, logits):
    """The gradient of f(log-probabilities) with respect to the logits, by autograd of the exact quantity."""
    theta = logits.clone().requires_grad_()
    return torch.autograd.grad(f(torch.log_softmax(theta, -1)), theta)[0]


def score(logps):
    """grad log pi(y) with respect to the logits, all y: row y is e_y - pi. (N, N)"""
    return torch.eye(len(logps), dtype=torch.float64) - logps.exp()


@given(worlds(policies=1), betas, st.floats(-30, 30))
def test_the_policy_gradient_with_any_baseline(drawn, beta, baseline):
    """Claim 31. grad J = E_pi[(r - beta log(pi/ref) - b) grad log pi] for any baseline b: the KL's own gradient needs no
    term of its own, and b changes only the variance."""
    ref, reward, pi = drawn
    advantage = reward - tabular.implicit_reward(pi, ref, beta) - baseline                            # (N,)
    estimate = (pi.exp() * advantage) @ score(pi)
    want = exact_gradient(lambda logps: tabular.objective(logps, ref, reward, beta), pi)
    assert_same(estimate, want, 1e-11 * max(1, advantage.abs().max().item()), {
        "the KL penalty is missing from the reward": (pi.exp() * (reward - baseline)) @ score(pi)}, what="the policy gradient")


@given(worlds(policies=1))
def test_kl_estimators_and_their_gradients(drawn):
    """Claim 32. On samples of pi: E k1 = E k3 = KL(pi || ref), while E k2 is not; but as losses, E grad k1 = 0,
    E grad k2 = grad KL(pi || ref) and E grad k3 = grad KL(ref || pi): a good estimate of a KL is not a good loss."""
    ref, _, pi = drawn
    p = pi.exp()
    k1, k2, k3 = tabular.kl_estimators(pi, ref)
    kl = math.fsum(a * (b - c) for a, b, c in zip(p.tolist(), pi.tolist(), ref.tolist()))
    scale = max(1.0, (ref - pi).exp().max().item())                 # k3 holds ref/pi, which may be e^20
    assert_same((p * k1).sum(), vector(kl)[0], 1e-10, what="E k1")
    assert_same((p * k3).sum(), vector(kl)[0], 1e-10, {"the k1 in k3 has the wrong sign": (p * (k3 - 2 * k1)).sum()}, what="E k3")
    assert (k3 >= -1e-12).all(), "k3 is never negative, for any sample"

    def expected_gradient(k):                        # E_{y~pi}[grad k(y)], the sampling not differentiated
        return exact_gradient(lambda logps: (p * tabular.kl_estimators(logps, ref)[k]).sum(), pi)
    zero = torch.zeros_like(pi)
    assert_same(expected_gradient(0), zero, 1e-12, what="E grad k1")
    assert_same(expected_gradient(1), exact_gradient(lambda logps: world.kl(logps, ref), pi), 1e-10, what="E grad k2")
    assert_same(expected_gradient(2), exact_gradient(lambda logps: world.kl(ref, logps), pi), 1e-14 * scale + 1e-10, {
        "this is grad KL(pi || ref)": exact_gradient(lambda logps: world.kl(logps, ref), pi)}, what="E grad k3")


def test_k2_is_biased():
    """Claim 32, the other half: for one policy E k2 is worked by hand and is not the KL. pi = (3/4, 1/4), ref = (1/2, 1/2)."""
    pi, ref = vector(3 / 4, 1 / 4).log(), vector(1 / 2, 1 / 2).log()
    a, b = math.log(3 / 2), math.log(1 / 2)
    _, k2, _ = tabular.kl_estimators(pi, ref)
    assert_same((pi.exp() * k2).sum(), vector((3 * a * a + b * b) / 8)[0], 1e-12, {"the half is missing": vector((3 * a * a + b * b) / 4)[0]},
         what="E k2")
    assert abs((pi.exp() * k2).sum() - world.kl(pi, ref)) > 1e-3


@given(worlds(), betas, st.lists(st.floats(0.05, 1), min_size=1, max_size=6), st.floats(-5, 5))
def test_mirror_descent_from_the_reference_lands_on_the_optimum(drawn, beta, steps, baseline):
    """Claim 36 (MDPO, https://arxiv.org/abs/2005.09814). Each step multiplies the policy by exp(t A), A any advantage; from
    ref, with steps that add up to 1/beta, it lands exactly on pi*, in however many steps: early stopping is a KL penalty."""
    ref, reward = drawn
    logps = ref
    for share in steps:
        logps = tabular.mirror_step(logps, reward - baseline, share / sum(steps) / beta)
    assert_same(logps.exp(), world.optimal_policy(ref, reward, beta).exp(), 1e-9 * max(1, 1 / beta), what="the policy after the last step")


@given(worlds(policies=1), st.floats(-1, 1).map(lambda e: 10 ** e), st.floats(-2, 1).map(lambda e: 10 ** e))
def test_a_mirror_step_maximises_what_it_says(drawn, beta, t):
    """The step is the maximiser of E[A] - beta KL(pi || ref) - KL(pi || current)/t: at it the gradient of that is zero
    (1e-9), and random policies do worse."""
    ref, reward, pi = drawn
    value = lambda logps: tabular.objective(logps, ref, reward, beta) - world.kl(logps, pi) / t
    after = tabular.mirror_step(pi, reward, t, ref, beta)
    assert exact_gradient(value, after).abs().max() < 1e-9 * max(1, 1 / t, beta)
    assert value(pi) <= value(after) + 1e-9 * max(1, 1 / t, beta) and value(ref) <= value(after) + 1e-9 * max(1, 1 / t, beta)


@given(worlds(policies=1), betas, st.floats(-3, 2).map(lambda e: 10 ** e))
def test_mirror_descent_with_a_kl_contracts(drawn, beta, t):
    """Claim 37. With -beta KL(pi || ref) in the step, the centred log-ratio to pi* shrinks by exactly 1/(1 + beta t) a step,
    from any policy."""
    ref, reward, pi = drawn
    star = world.optimal_policy(ref, reward, beta)
    centred = lambda logps: (logps - star) - (logps - star).mean()
    assert_same(centred(tabular.mirror_step(pi, reward, t, ref, beta)), centred(pi) / (1 + beta * t), 1e-9 * max(1, 1 / beta), {
        "no contraction: the pull to the reference is missing": centred(pi)}, what="the distance to pi*")


@given(worlds(policies=1), st.floats(-2, 1).map(lambda e: 10 ** e))
def test_the_first_mirror_step_is_the_policy_gradient(drawn, t):
    """Claim 38. At pi = pi_k the KL between them has no gradient, so the first gradient step on MDPO's objective
    E_{pi_k}[pi/pi_k A] - KL(pi || pi_k)/t is the policy gradient, whatever t."""
    ref, reward, pi = drawn
    surrogate = lambda logps: (logps - pi).exp().mul(pi.exp() * reward).sum() - world.kl(logps, pi) / t
    assert_same(exact_gradient(surrogate, pi), (pi.exp() * reward) @ score(pi), 1e-10 * max(1, 1 / t), what="the first step")
    assert exact_gradient(lambda logps: world.kl(logps, pi), pi).abs().max() < 1e-12
    moved = torch.log_softmax(pi + torch.linspace(0, 1, len(pi), dtype=torch.float64), -1)
    assume((moved - pi).abs().max() > 1e-3)
    assert exact_gradient(lambda logps: world.kl(logps, pi), moved).abs().max() > 0, "a step later the KL pulls back"


# ---- PPO, GAE and REINFORCE++: the functions of rlhf.py

@given(numbers(6, 5), numbers(6, 3), st.sampled_from([0.1, 0.2, 0.5]))
def test_ppos_gradient_at_ratio_1_is_the_policy_gradient(drawn, advantage, clip):
    """Claim 33, first half. At pi = pi_old the clipped loss of every token has the gradient -A grad log pi, clip or no clip."""
    old = drawn.view(2, 3)
    logps, advantage, mask = old.clone().requires_grad_(), advantage.view(2, 3), torch.ones(2, 3).bool()
    for limit in (clip, None):
        gradient = torch.autograd.grad(rlhf.ppo_loss(logps, old, advantage, mask, limit), logps)[0]
        assert_same(gradient, -advantage / 2, 1e-12, {
            "the sign is flipped: the loss is minus the gain": advantage / 2, "a sum over responses; wanted their mean": -advantage,
            "a mean over tokens; J is a sum over a response's tokens": -advantage / 6}, what="the gradient at ratio 1")


@given(st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3), st.floats(-1.5, 1.5), st.sampled_from([0.1, 0.2, 0.5]))
def test_ppos_gradient_is_zero_where_the_policy_has_gone_far_enough(advantage, log_ratio, clip):
    """Claim 33, second half. For A > 0 the gradient is 0 beyond rho = 1 + clip, for A < 0 below 1 - clip, and -rho A everywhere
    else: also where the policy went far the wrong way, so that it can come back."""
    ratio = math.exp(log_ratio)
    assume(min(abs(ratio - 1 - clip), abs(ratio - 1 + clip)) > 1e-6)           # at the kink there is no gradient
    logps = vector(log_ratio).view(1, 1).requires_grad_()
    loss = rlhf.ppo_loss(logps, torch.zeros(1, 1).double(), vector(advantage).view(1, 1), torch.ones(1, 1).bool(), clip)
    far_enough = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    gradient = torch.autograd.grad(loss, logps)[0] if loss.requires_grad else torch.zeros(1, 1).double()
    assert_same(gradient, vector(0.0 if far_enough else -ratio * advantage).view(1, 1), 1e-12, {
        "nothing is clipped": vector(-ratio * advantage).view(1, 1),
        "clipped on both sides: PPO takes the minimum of the clipped and the unclipped gain, so that a step too far the wrong way "
        "still has a gradient": torch.zeros(1, 1).double()}, what=f"the gradient at ratio {ratio:.3f}, A = {advantage:.3f}")


@st.composite
def trajectories(draw):
    """(rewards, values, mask), each (3,5): prompts and responses of different lengths; outside the mask stands rubbish."""
    start, length = draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)), draw(st.lists(st.integers(1, 3), min_size=3, max_size=3))
    position = torch.arange(5)
    mask = torch.stack([(position >= s) & (position < s + n) for s, n in zip(start, length)])
    return draw(numbers(15, 5)).view(3, 5), draw(numbers(15, 5)).view(3, 5), mask


@given(trajectories(), st.floats(0.5, 1))
def test_gae_between_the_td_error_and_the_return(drawn, gamma):
    """Claim 34. lambda = 0: r + gamma V' - V, V' = 0 after the last token. lambda = gamma = 1: the sum of what is to come, minus
    V. In between: the exponentially weighted sum of TD errors (1506.02438, Eq. 16), here added up term by term."""
    rewards, values, mask = drawn
    td, weighted = torch.zeros(3, 5).double(), torch.zeros(3, 5).double()
    to_go = torch.zeros(3, 5).double()
    for b in range(3):
        inside = mask[b].nonzero().flatten().tolist()
        for i, t in enumerate(inside):
            td[b, t] = rewards[b, t] + (gamma * values[b, inside[i + 1]] if i + 1 < len(inside) else 0.0) - values[b, t]
            to_go[b, t] = math.fsum(rewards[b, u].item() for u in inside[i:]) - values[b, t]
        for i, t in enumerate(inside):
            weighted[b, t] = sum((gamma * 0.7) ** k * td[b, u] for k, u in enumerate(inside[i:]))
    assert_same(rlhf.gae(rewards, values, mask, gamma, 0.0), td, 1e-12, what="GAE at lambda = 0")
    assert_same(rlhf.gae(rewards, values, mask, gamma, 0.7), weighted, 1e-12, what="GAE at lambda = 0.7")
    assert_same(rlhf.gae(rewards, values, mask, 1.0, 1.0), to_go, 1e-12, {
        "the value is not subtracted": torch.where(mask, to_go + values, 0.0)}, what="GAE at lambda = gamma = 1")


@given(trajectories(), numbers(15, 3), numbers(3, 5), betas)
def test_reward_to_go_is_reinforce_plus_plus_advantage(drawn, other, scores, beta):
    """Claim 35. With gamma = 1, what is still to come of {-beta log(pi/ref) per token, the score at EOS} is REINFORCE++'s
    token advantage before normalisation, r - beta sum_{u >= t} log(pi_u/ref_u) (2501.03262); from the first token on it is
    r - beta log(pi/ref) of the whole response, whose expectation is J. And it is GAE with V = 0 and lambda = 1."""
    logps, ref_logps, mask = drawn[0], other.view(3, 5), drawn[2]
    rewards = rlhf.token_rewards(scores, logps, ref_logps, mask, beta)
    k1, want = torch.where(mask, logps - ref_logps, 0.0), torch.zeros(3, 5).double()
    for b in range(3):
        for t in mask[b].nonzero().flatten().tolist():
            want[b, t] = scores[b] - beta * math.fsum(k1[b, t:].tolist())
    got = rlhf.reward_to_go(rewards, mask)
    scale = 1e-12 * max(1, beta)
    assert_same(got, want, scale, {
        "beta is missing": torch.where(mask, scores[:, None] - k1.flip(1).cumsum(1).flip(1), 0.0),
        "the KL is added; it is a penalty": torch.where(mask, 2 * scores[:, None] - want, 0.0)}, what="the advantage")
    assert_same(got, rlhf.gae(rewards, torch.zeros(3, 5).double(), mask, 1.0, 1.0), scale, what="GAE without a critic")
    first = torch.stack([got[b, mask[b].nonzero()[0, 0]] for b in range(3)])
    assert_same(first, scores - beta * k1.sum(-1), scale, what="the whole response's")


def all_texts(vocab, longest):
    """Every response of a vocabulary whose token 0 is EOS: those that end in it, and those cut off at the longest length."""
    texts, growing = [], [[]]
    for n in range(longest):
        grown = [t + [v] for t in growing for v in range(vocab)]
        texts += [t for t in grown if t[-1] == 0]
        growing = [t for t in grown if t[-1] != 0]
    return texts + growing


@pytest.fixture
def small_language():
    """A tiny policy and reference over 4 tokens, all 85 texts of at most 4 tokens after one prompt, and a score for each."""
    torch.manual_seed(5)
    policy, reference = (GPT(GPTConfig(block_size=6, vocab_size=4, n_layer=1, n_head=2, n_embd=8)).double() for _ in "pr")
    texts = all_texts(4, 4)
    rows = torch.tensor([[1, 2] + t + [0] * (4 - len(t)) for t in texts])                             # (N, T)
    mask = torch.tensor([[True] * len(t) + [False] * (5 - len(t)) for t in texts])                    # (N, S)
    mask = torch.cat([torch.zeros(len(texts), 1).bool(), mask], 1)[:, :5]                             # the prompt's second token
    return policy, reference, rows, mask, torch.randn(len(texts), dtype=torch.float64)


def flat_gradient(value, policy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()))])


@pytest.mark.parametrize("critic", [False, True], ids=["reward to go", "gae, lambda = 1, any critic"])
def test_one_ppo_step_is_the_exact_gradient_of_j(small_language, critic):
    """Claim 33, the whole step, with 31 and 35 in it. The gradient of the PPO loss of every text a tiny GPT can write, at ratio 1, weighted with
    the text's probability, is minus the gradient of the exact J = sum_y pi (r - beta log(pi/ref)), 1e-9. With a critic that is
    wrong everywhere too: lambda = 1 makes it a mere baseline. And 20,000 sampled texts give it within 3 standard errors (of
    the gradient's projections on 8 random directions, fixed before)."""
    policy, reference, rows, mask, scores = small_language
    beta = 0.3
    logps = dpo.token_logps(policy(rows), rows)                                                       # (N, S)
    ref_logps = dpo.token_logps(reference(rows), rows).detach()
    whole, ref_whole = (torch.where(mask, t, 0.0).sum(-1) for t in (logps, ref_logps))                # (N,)
    assert_same(whole.exp().sum(), vector(1.0)[0], 1e-12, what="the probability of all texts")
    exact = flat_gradient((whole.exp() * (scores - beta * (whole - ref_whole))).sum(), policy)

    with torch.no_grad():
        rewards = rlhf.token_rewards(scores, logps, ref_logps, mask, beta)
        values = rlhf.ScalarModel(policy).double()
        torch.nn.init.normal_(values.scalar.weight)
        advantages = rlhf.gae(rewards, values(rows)[:, :-1], mask, 1.0, 1.0) if critic else rlhf.reward_to_go(rewards, mask)
    rows_of = []                                     # the gradient of the PPO loss of each text alone
    for i in range(len(rows)):
        lp = dpo.token_logps(policy(rows[i:i + 1]), rows[i:i + 1])
        rows_of.append(-flat_gradient(rlhf.ppo_loss(lp, lp.detach(), advantages[i:i + 1], mask[i:i + 1]), policy))
    each, p = torch.stack(rows_of), whole.exp().detach()                                              # (N, P), (N,)
    assert_same(p @ each, exact, 1e-9, {"the KL penalty is missing": flat_gradient((dpo_whole(policy, rows, mask).exp() * scores).sum(), policy),
                                        "the sign is flipped": -exact}, what="the expected PPO gradient")

    drawn = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(1))
    directions = torch.nn.functional.normalize(torch.randn(each.size(1), 8, dtype=torch.float64), dim=0)
    sampled = each[drawn] @ directions                                                                # (20000, 8)
    error = (sampled.mean(0) - exact @ directions) / (sampled.std(0) / math.sqrt(len(drawn)))
    assert error.abs().max() < 3, f"standard errors off: {error.tolist()}"


def dpo_whole(policy, rows, mask):
    return torch.where(mask, dpo.token_logps(policy(rows), rows), 0.0).sum(-1)
