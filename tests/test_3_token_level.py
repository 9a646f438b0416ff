"""The token level: a response is a path of tokens.

The policy that is optimal for whole responses is also optimal in a game with one token a move (From
r to Q*, https://arxiv.org/abs/2404.12358; equation numbers with a * are this paper's). The second
half is about what the loss does to probabilities, as opposed to margins. float64, 1e-10 unless
stated.
"""
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpo
import losses
import world
from lab import tabular
from tools import Mistake, assert_same, betas, grades, vector, worlds

V, T = 3, 3


def beta_as_text(beta):
    return f"beta={beta}"


@pytest.fixture(params=[0.4, 1.0, 3.0], ids=beta_as_text)
def tree(request):
    """(beta, the reference token by token, the reward of every text (3,3,3)).

    The texts are all 27 that consist of three tokens from a vocabulary of three.
    """
    ref = tabular.random_tree(V, T)
    return request.param, ref, 1.5 * torch.randn(V, V, V, dtype=torch.float64)


def all_texts():
    return itertools.product(range(V), repeat=T)


def test_a_random_tree_has_a_distribution_after_every_prefix():
    """The probabilities of the next token are compared with a sum of 1, to 1e-12."""
    for t, level in enumerate(tabular.random_tree(V, T)):
        ones = torch.ones((V,) * t, dtype=torch.float64)
        assert_same(level.exp().sum(-1), ones, 1e-12, what=f"the sum of level {t}")


def at_the_end(reward):
    """A reward of whole texts as token rewards: 0 until the last token, and all of it there."""
    return [torch.zeros(V, dtype=torch.float64), torch.zeros(V, V, dtype=torch.float64), reward]


def test_soft_value_iteration_is_the_optimal_policy(tree):
    """Claim 18 (Eq. 5*-7*, and 4). Soft value iteration goes backwards from the last token.

    The product of its policies for single tokens is the pi* of whole texts, and V(s_0) is
    beta log Z. Here pi* and Z are plain sums over the 27 texts. They are compared to 1e-10.
    """
    beta, ref, reward = tree
    values, policy = tabular.soft_value_iteration(ref, at_the_end(reward), beta)

    def ref_logp(y):
        return sum(ref[t][y[:t + 1]].item() for t in range(T))

    z = 0.0
    for y in all_texts():
        z += math.exp(ref_logp(y)) * math.exp(reward[y].item() / beta)
    assert_same(values[0], vector(beta * math.log(z))[0], 1e-10,
                {"beta is missing; V(s_0) = beta log Z": vector(math.log(z))[0]}, what="V(s_0)")
    for level in policy:
        ones = torch.ones(level.shape[:-1], dtype=torch.float64)
        assert_same(level.exp().sum(-1), ones, 1e-12,
                    what="the sum of a token's probabilities")
    for y in all_texts():
        star = math.exp(ref_logp(y) + reward[y].item() / beta) / z
        logp = sum(policy[t][y[:t + 1]] for t in range(T))
        assert_same(logp.exp(), vector(star)[0], 1e-10, what=f"pi*{y}")


def test_token_log_ratios_add_up_to_the_advantage(tree):
    """Claim 19 (Eq. 10*). sum_t beta log(pi*/ref) = r - V(s_0).

    Each term is r_t + V(s_(t+1)) - V(s_t), also where every token has a reward. The log-ratios of
    the optimal policy are compared with both formulas, for every text and prefix, to 1e-10.
    """
    beta, ref, reward = tree
    for token_rewards in (at_the_end(reward), [torch.randn_like(level) for level in ref]):
        values, policy = tabular.soft_value_iteration(ref, token_rewards, beta)
        ratios = [beta * (pi - q) for pi, q in zip(policy, ref)]
        total = tabular.along(token_rewards)[-1]
        assert_same(tabular.along(ratios)[-1], total - values[0], 1e-10,
                    {"V(s_0) is missing": total}, what="the sum of the log-ratios times beta")
        for t in range(T):
            for s in itertools.product(range(V), repeat=t + 1):
                want = token_rewards[t][s] + values[t + 1][s] - values[t][s[:-1]]
                assert_same(ratios[t][s], want, 1e-10, what=f"the last token of {s}")


def test_prefix_sums_are_what_the_prefix_promises(tree):
    """Claim 20. The log-ratios of a prefix sum to beta log E_ref[e^(r/beta) | prefix] - V(s_0).

    So DPO's policy contains an exact value function of every prefix. The sums are compared with the
    conditional expectation, which here is a plain sum, to 1e-10.
    """
    beta, ref, reward = tree
    values, policy = tabular.soft_value_iteration(ref, at_the_end(reward), beta)
    sums = tabular.along([beta * (pi - q) for pi, q in zip(policy, ref)])
    for t in range(T):
        for prefix in itertools.product(range(V), repeat=t + 1):
            promise = 0.0
            for rest in itertools.product(range(V), repeat=T - t - 1):
                y = prefix + rest
                ref_logp = sum(ref[k][y[:k + 1]].item() for k in range(t + 1, T))
                promise += math.exp(ref_logp + reward[y].item() / beta)
            assert_same(sums[t][prefix], beta * math.log(promise) - values[0], 1e-10,
                        what=f"the sum of the prefix {prefix}")


@given(worlds(policies=1), betas)
def test_the_mean_implicit_reward_reads_off_a_kl(drawn, beta):
    """Claim 21 (Eq. 16*). E_ref[r^] = -beta KL(ref || pi).

    The mean reward is compared with a plain sum for the KL, to 1e-10. So with pairs that are drawn
    from ref, the mean of chosen and rejected rewards is never positive. Negative rewards are no
    sign of failure. Sometimes ref is the distribution of the chosen responses themselves, as for a
    reference that was fitted to them. Then the mean of the chosen rewards alone is <= 0, for every
    policy.
    """
    ref, _, pi = drawn
    rewards = tabular.implicit_reward(pi, ref, beta)
    mean = (ref.exp() * rewards).sum()
    kl = math.fsum(math.exp(q) * (q - p) for q, p in zip(ref.tolist(), pi.tolist()))
    assert_same(mean, vector(-beta * kl)[0], 1e-10, {
        "this is KL(pi || ref), the other direction": -beta * world.kl(pi, ref)},
        what="E_ref[r^]")
    assert mean <= 1e-12 * max(1, beta), f"the mean is {mean:g}, but it is never positive"


def loss_of_the_first_two(logps, ref, beta):
    """Eq. 7 of one pair: response 0 is chosen, response 1 is rejected. A scalar."""
    return dpo.dpo_loss(logps[:1], logps[1:2], ref[:1], ref[1:2], beta=beta)[0].sum()


@grades("dpo_loss")
@given(worlds(n=4), betas)
def test_a_tabular_pair_alone_cannot_lower_the_chosen(drawn, beta):
    """Claim 22. With one free logit for each response, a step along -grad L is along e_w - e_l.

    Along it, per unit of step, dlog pi_w = 1 - pi_w + pi_l > 0 and dlog pi_l = pi_l - pi_w - 1 < 0.
    For every other response dlog pi_c = pi_l - pi_w. The step and the changes, both by autograd,
    are compared with these formulas, to 1e-12.
    """
    ref, start = drawn
    theta = start.clone().requires_grad_()
    loss = loss_of_the_first_two(torch.log_softmax(theta, -1), ref, beta)
    step = -torch.autograd.grad(loss, theta, retain_graph=True)[0]
    assert step[0] >= 0, "the step must not lower the logit of the chosen response"
    assert (step[2:].abs() <= 1e-12 * max(1, beta)).all(), (
        "the step moves other logits than the two of the pair")
    assert_same(step[1], -step[0], 1e-12 * max(1, beta), what="the step of the rejected logit")

    def log_softmax(t):
        return torch.log_softmax(t, -1)

    direction = vector(1, -1, 0, 0)
    change = torch.autograd.functional.jvp(log_softmax, theta.detach(), direction)[1]
    p = torch.softmax(theta.detach(), -1)
    others = p[1] - p[0]
    want = torch.stack([1 - p[0] + p[1], p[1] - p[0] - 1, others, others])
    assert_same(change, want, 1e-12, what="dlog pi")
    assert change[0] > 0, "the chosen response must gain"


@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.2, 2.0])
def test_what_is_in_no_pair_is_not_looked_at(beta):
    """Claim 23 (compare Xu et al., https://arxiv.org/abs/2404.10719, Table 1).

    Responses 2 and 3 are in no pair. After any amount of training pi(2)/pi(3) is still
    ref(2)/ref(3) (1e-12), even if response 3 is very bad. The probability of the two together does
    change.
    """
    ref = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)

    def loss(theta):
        return loss_of_the_first_two(torch.log_softmax(theta, -1), ref, beta)

    logps = torch.log_softmax(tabular.gradient_flow(loss, ref, 30.0, steps=40), -1)
    assert_same(logps[2] - logps[3], ref[2] - ref[3], 1e-12, what="log pi(2)/pi(3)")
    assert (logps[:2] - ref[:2]).abs().max() > 0.1, "the training has changed nothing"


@grades("dpo_loss")
def test_a_shared_feature_can_push_the_chosen_down():
    """Claim 24 (likelihood displacement). A log-linear policy has one feature, w: 1, l: 0, c: 3.

    It starts uniform. A step that raises h raises the weight of the feature. That favours c, which
    has most of the feature. So one DPO step lowers w and l and raises c, while the margin grows.
    By hand: dlog pi_y = (phi_y - mean phi), with mean phi = 4/3. The changes in a step are compared
    with this, to 1e-3, and the step itself with beta sigma(0) (phi_w - phi_l), to 1e-12.
    """
    phi = vector(1, 0, 3)
    ref = torch.log_softmax(torch.zeros(3, dtype=torch.float64), -1)
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = loss_of_the_first_two(torch.log_softmax(weight * phi, -1), ref, beta=0.5)
    step = -torch.autograd.grad(loss, weight)[0]
    assert_same(step, vector(0.5 * 0.5 * (1 - 0))[0], 1e-12,
                what="the step beta sigma(0) (phi_w - phi_l)")
    after = torch.log_softmax(1e-3 * step * phi, -1)
    assert_same((after - ref) / (1e-3 * step), phi - 4 / 3, 1e-3, what="dlog pi")
    assert after[0] < ref[0], "the chosen response must lose here"
    assert after[1] < ref[1], "the rejected response must lose here"
    assert after[2] > ref[2], "the response that is in no pair must gain here"
    assert after[0] - after[1] > ref[0] - ref[1], "the margin must grow all the same"


def test_eq7_does_not_see_mass_that_leaks_evenly():
    """The reason for `missing_mass`: when both responses become less likely by the same factor, the
    loss stays as it was."""
    w, l, rw, rl = torch.randn(4, 9, dtype=torch.float64)
    before = dpo.dpo_loss(w, l, rw, rl)[0]
    after = dpo.dpo_loss(w - 3, l - 3, rw, rl)[0]
    assert_same(after, before, 1e-12, what="the loss after both fell by 3 nats")
    assert losses.missing_mass(w - 3, rw) > losses.missing_mass(w, rw)


def missing_mass_of_each(logps, ref):
    """missing_mass of each response that ref writes, as a batch of one. logps (5,), ref (4,)."""
    return [losses.missing_mass(logps[y:y + 1], ref[y:y + 1].log()) for y in range(4)]


@grades("missing_mass")
def test_missing_mass_is_the_mean_of_ratios():
    """Over a batch it is 1 - mean(pi/ref). It is not exp of a mean, and not pi alone."""
    pi, ref = vector(0.5, 0.1, 0.3), vector(0.25, 0.4, 0.2)
    ratio = pi / ref
    assert_same(losses.missing_mass(pi.log(), ref.log()), 1 - ratio.mean(), 1e-12, {
        "1 - is missing. This is the mass that is still on the reference's text": ratio.mean(),
        "the sign is flipped, or an absolute value is taken: 1 minus the mean":
            ratio.mean() - 1,
        "this is exp of the mean; wanted the mean of exp": 1 - ratio.log().mean().exp(),
        "this is a sum; wanted the mean": 1 - ratio.sum(),
        "the ratio is upside down; wanted pi/ref": 1 - (1 / ratio).mean(),
        "this is the ratio of means; wanted the mean of ratios": 1 - pi.mean() / ref.mean(),
        "exp is missing. This is the mean of the log-ratios":
            [1 - ratio.log().mean(), ratio.log().mean(), -ratio.log().mean()],
        "the reference is ignored; wanted pi/ref": 1 - pi.mean(),
        "this is one number for each response; wanted their mean, a scalar": 1 - ratio,
        "this is a difference of probabilities; wanted pi/ref":
            [1 - (pi - ref).mean(), (ref - pi).mean(), (ref - pi).sum()],
        "ratios above 1 are cut off": 1 - ratio.clamp(max=1).mean(),
        "this is the logarithm of the mass": [-ratio.mean().log(), ratio.mean().log()],
        "this is the median; wanted the mean": 1 - ratio.median(),
        "it is added to 1; wanted 1 minus the mean": 1 + ratio.mean(),
        "the reference's sign is wrong; wanted pi/ref": 1 - (pi * ref).mean(),
        "this is the sum over the batch; wanted the mean": (1 - ratio).sum(),
        "this is a quotient of logarithms; pi/ref is exp of their difference":
            1 - (pi.log() / ref.log()).mean(),
        "a negative estimate is cut off at 0. Then it is not unbiased": (1 - ratio).clamp(0).mean(),
    }, what="missing_mass")


@grades("missing_mass")
def test_a_batch_without_missing_mass_may_have_a_negative_estimate():
    """The estimate is unbiased, so it is negative for some batches. It is not cut off at 0."""
    positive = losses.missing_mass(vector(0.1, 0.2).log(), vector(0.5, 0.4).log())
    assert_same(positive, vector(0.65)[0], 1e-12, what="missing_mass")
    long = losses.missing_mass(vector(-2000.0, -2001.0), vector(-2000.0, -2000.0))
    long = torch.as_tensor(long)
    if not long.isfinite():
        raise Mistake(f"missing_mass of long responses is {long.item()}. exp of a log-probability "
                      "underflows: subtract first, and take exp of the difference")
    got = losses.missing_mass(vector(0.9, 0.8).log(), vector(0.3, 0.4).log())
    assert_same(got, vector(-1.5)[0], 1e-12, {
        "a negative estimate is cut off at 0. Then it is not unbiased": vector(0.0)[0]},
        what="missing_mass")


@grades("missing_mass")
def test_missing_mass_can_be_trained():
    """The gradient at log pi is -(pi/ref)/B, to 1e-12."""
    logps = vector(0.5, 0.1).log().requires_grad_()
    mass = losses.missing_mass(logps, vector(0.25, 0.4).log())
    if not torch.is_tensor(mass) or not mass.requires_grad:
        raise Mistake("missing_mass carries no gradient to the policy: it could not be a term of "
                      "the loss. Is there a detach or an item() too many?")
    slope = torch.autograd.grad(mass, logps)[0]
    assert_same(slope, vector(-1.0, -0.125), 1e-12, what="the gradient of missing_mass")


@grades("missing_mass")
@given(st.integers(0, 10 ** 6))
def test_missing_mass_is_unbiased(seed):
    """Eq. 9. Of 5 responses, ref writes 4. E_{y ~ ref}[1 - pi/ref] is the mass of the fifth.

    The expectation is a sum over ref's responses. It holds for every policy (1e-10).
    """
    g = torch.Generator().manual_seed(seed)
    ref = torch.softmax(torch.randn(4, generator=g, dtype=torch.float64), -1)
    logps = torch.log_softmax(2 * torch.randn(5, generator=g, dtype=torch.float64), -1)
    estimates = torch.stack([torch.as_tensor(m) for m in missing_mass_of_each(logps, ref)])
    assert estimates.shape == (4,), (
        f"missing_mass must return a scalar; it returned the shape {tuple(estimates.shape[1:])}")
    fifth = logps[4].exp()
    assert_same((ref * estimates).sum(), fifth, 1e-10, what="E_ref[missing_mass]")


@grades("missing_mass")
def test_missing_mass_does_not_pull_at_a_policy_that_leaks_nothing():
    """Where the policy writes only what ref writes, the mean gradient over ref is zero (1e-12).

    So the optimum of Eq. 7 stays the optimum. Where the policy writes anything else, the gradient
    is not zero.
    """
    ref = torch.softmax(torch.randn(4, dtype=torch.float64), -1)
    theta = torch.randn(5, dtype=torch.float64)

    def pull(theta):
        theta = theta.clone().requires_grad_()
        each = missing_mass_of_each(torch.log_softmax(theta, -1), ref)
        loss = sum(q * m for q, m in zip(ref, each))
        return torch.autograd.grad(loss, theta)[0].abs().max()

    leaks = pull(theta)
    theta[4] = -80.0
    assert leaks > 1e-3, f"the gradient is {leaks:.1e} where mass is missing: it must not be zero"
    assert pull(theta) < 1e-12, (
        f"the gradient is {pull(theta):.1e} where no mass is missing: it must be zero")


def test_text_leaves_through_stray_mass():
    """Texts of three tokens, each one of five. The reference writes only the tokens 0 to 2. Then
    the policy's mass on all other text is a sum over beginnings: how often the policy comes to it,
    times its stray mass there (1e-12). The reference, whose tokens are all likely, has none."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.tensor([True, True, True, False, False])
    own = [torch.randn(*[5] * t, 5, generator=generator, dtype=torch.float64) for t in range(3)]
    p = [logits.softmax(-1) for logits in own]  # (5,), (5,5), (5,5,5)
    text = p[0][:, None, None] * p[1][:, :, None] * p[2]  # (5, 5, 5)
    wanted = 1 - text[:3, :3, :3].sum()
    leaves, reached = 0.0, torch.ones(())
    for logits, probs in zip(own, p):
        at = logits[(slice(3),) * (logits.dim() - 1)].reshape(-1, 5)  # the beginnings inside
        stray = losses.stray_mass(at, inside.expand(len(at), 5))
        leaves += (reached.reshape(-1) * stray).sum()
        reached = reached.reshape(-1, 1) * probs[(slice(3),) * probs.dim()].reshape(-1, 3)
    assert 0.1 < wanted < 0.9
    assert_same(leaves, wanted, 1e-12, what="the mass that leaves")
    assert losses.stray_mass(at, torch.ones(len(at), 5, dtype=torch.bool)).sum() == 0


def test_the_stray_mass_is_bounded_and_can_be_trained():
    """At most 1, however far the logits are apart (1e-12). Its gradient by hand (1e-12): for token
    i it is p_i (1 - stray) if i is stray, else -p_i stray."""
    far = vector(-1e4, 1e4, 0.0)
    assert_same(losses.stray_mass(far, torch.tensor([True, False, True])), vector(1.0)[0], 1e-12,
                what="the stray mass")
    logits = vector(0.3, -0.2, 1.0).requires_grad_()
    likely = torch.tensor([False, True, False])
    mass = losses.stray_mass(logits, likely)
    p = [math.exp(x) / sum(map(math.exp, (0.3, -0.2, 1.0))) for x in (0.3, -0.2, 1.0)]
    stray = p[0] + p[2]
    assert_same(mass.detach(), vector(stray)[0], 1e-12, {
        "the mass of the likely tokens": vector(p[1])[0]}, what="the stray mass")
    slope = vector(p[0] * (1 - stray), -p[1] * stray, p[2] * (1 - stray))
    assert_same(torch.autograd.grad(mass, logits)[0], slope, 1e-12, what="its gradient")
