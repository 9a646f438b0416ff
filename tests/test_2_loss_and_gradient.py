"""The loss and its gradient (section 4, Eq. 7, and what follows from it).

The loss is compared with plain formulas, with a minimiser, and with differential equations that
were solved by hand. The gradient is computed in three ways. float64. The tolerance is 1e-10 unless
a test states another one.
"""
import inspect
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import dpo
import losses
import world
from lab import tabular
from model import GPTConfig
from tools import (
    Bare,
    Mistake,
    assert_refused,
    assert_same,
    betas,
    grades,
    numbers,
    softplus,
    vector,
    worlds,
)

LN2 = math.log(2)


def loss_mistakes(w, l, rw, rl, beta):
    """What is often written instead of Eq. 7: {what was probably done: the value that it gives}."""
    h = (w - l) - (rw - rl)
    return {
        "beta stands outside the sigmoid. You have -beta log sigma(h). Eq. 7 is "
        "-log sigma(beta h)": beta * softplus(-h),
        "your loss is right at beta = 0.1 only. Does it use the argument beta, inside the "
        "sigmoid?": softplus(-0.1 * h),
        "beta is missing. Eq. 7 is -log sigma(beta h)": softplus(-h),
        "beta is in the loss twice. Eq. 7 is -log sigma(beta h)":
            [softplus(-beta ** 2 * h), beta * softplus(-beta * h)],
        "h is divided by beta. Eq. 7 is -log sigma(beta h)": softplus(-h / beta),
        "this takes the absolute value of the margin. A pair that is ranked wrongly must have a "
        "large loss": softplus(-beta * h.abs()),
        "the reference is ignored. That is another loss, CPO. Eq. 7 has log(pi/ref) for both "
        "responses": softplus(-beta * (w - l)),
        "the reference's log-ratio has the wrong sign. It is subtracted in Eq. 7":
            softplus(-beta * ((w - l) + (rw - rl))),
        "chosen and rejected are swapped in the policy's log-ratio alone":
            softplus(-beta * ((l - w) - (rw - rl))),
        "the loss prefers the wrong response. Chosen and rejected are swapped, or policy and "
        "reference, or the sign of h is flipped": softplus(beta * h),
        "the sign of the loss is flipped. log sigma is negative, and the loss is minus log sigma":
            -softplus(-beta * h),
        "the log is missing. Eq. 7 is -log sigma(beta h)":
            [-torch.sigmoid(beta * h), torch.sigmoid(beta * h), torch.sigmoid(-beta * h)],
        "this is the mean; wanted the loss of each pair, (B,)": softplus(-beta * h).mean(),
        "this is the sum; wanted the loss of each pair, (B,)": softplus(-beta * h).sum(),
        "each loss is divided by the number of pairs; the caller takes the mean":
            softplus(-beta * h) / len(h),
        "the loss is divided by beta": softplus(-beta * h) / beta,
        "this is a logarithm to base 2; wanted nats": softplus(-beta * h) / LN2,
        "this is the hinge; wanted -log sigma(beta h)": [(1 - beta * h).clamp(min=0),
                                                         (-beta * h).clamp(min=0)],
        "each response has its own sigma; Eq. 7 has one, of the difference":
            softplus(-beta * (w - rw)) + softplus(beta * (l - rl)),
        "these are rewards; the losses come first": [beta * (w - rw), beta * (l - rl)],
        "this is beta h; wanted -log sigma(beta h)": [beta * h, -beta * h],
        "the responses' reference values are swapped with the policy's of the other":
            softplus(-beta * ((w - rl) - (l - rw))),
    }


def reward_mistakes(policy, ref, beta):
    """What is often written instead of the implicit reward, and what it gives."""
    return {
        "these are rewards without beta; r^ = beta (log pi - log ref)": policy - ref,
        "beta is in the reward twice; r^ = beta (log pi - log ref)": beta ** 2 * (policy - ref),
        "the reference is ignored; r^ = beta (log pi - log ref)": beta * policy,
        "ref and pi are swapped; r^ = beta (log pi - log ref)": beta * (ref - policy),
        "beta divides; r^ = beta (log pi - log ref)": (policy - ref) / beta,
        "beta multiplies log pi alone; r^ = beta (log pi - log ref)": beta * policy - ref,
        "the reference's sign is wrong; r^ = beta (log pi - log ref)": beta * (policy + ref),
        "this is the absolute value; a reward has a sign": beta * (policy - ref).abs(),
        "this is sigma of the reward; wanted the reward": torch.sigmoid(beta * (policy - ref)),
        "the batch's mean is subtracted": beta * ((policy - ref) - (policy - ref).mean()),
        "these are rewards at beta = 0.1; r^ = beta (log pi - log ref)": 0.1 * (policy - ref),
        "this is the mean over the batch; wanted the reward of each response, (B,)":
            beta * (policy - ref).mean(),
        "this is the sum over the batch; wanted the reward of each response, (B,)":
            beta * (policy - ref).sum(),
        "these are ratios of probabilities; r^ is beta times their logarithm":
            [(policy - ref).exp(), beta * (policy - ref).exp()],
    }


def check_rewards(chosen, rejected, logps, beta):
    """The implicit rewards, compared with r^ = beta log(pi/ref), section 4, to 1e-12."""
    w, l, rw, rl = logps
    assert_same(chosen, beta * (w - rw), 1e-12, reward_mistakes(w, rw, beta) | {
        "this is the rejected response's. The chosen rewards come first": beta * (l - rl),
        "this is the margin; wanted the reward of one response": beta * (w - rw - l + rl),
        "this compares chosen and rejected; wanted policy and reference":
            [beta * (w - l), beta * (rw - rl)],
        "each response has the reference's value of the other one": beta * (w - rl),
    }, what="the chosen reward")
    assert_same(rejected, beta * (l - rl), 1e-12, reward_mistakes(l, rl, beta) | {
        "this is the chosen response's. The chosen rewards come first": beta * (w - rw),
    }, what="the rejected reward")


def check_detached(rewards_of):
    """The rewards of rewards_of(w, l, rw, rl) carry no gradient, to the policy or the reference."""
    for whose, places in (("policy", (0, 1)), ("reference", (2, 3))):
        logps = four(3)
        for place in places:
            logps[place].requires_grad_()
        for reward, which in zip(rewards_of(*logps), ("chosen", "rejected")):
            if reward.requires_grad:
                raise Mistake(f"the {which} rewards carry a gradient to the {whose}: a detach is "
                              "missing. They are for looking at")


def check_slope(loss, w, l, want, what="the loss"):
    """The gradient of a loss (B,) at w and at l, compared with want (B,) and -want, to 1e-12."""
    if not loss.requires_grad:
        raise Mistake(f"{what} carries no gradient: it is cut off from the policy. Is there a "
                      "detach or a no_grad too many?")
    at_w, at_l = torch.autograd.grad(loss.sum(), (w, l), allow_unused=True)
    for slope, which, sign in ((at_w, "y_w", 1), (at_l, "y_l", -1)):
        if slope is None or not slope.any():
            raise Mistake(f"{what} has no gradient at log pi({which}|x). Is it detached?")
        assert_same(slope, sign * want, 1e-12, {
            "its sign is flipped": -sign * want,
            "this gradient is the mean over the batch; each pair has its own":
                (sign * want / len(want)),
        }, what=f"the gradient of {what} at log pi({which}|x)")


def four(n=50, scale=5):
    return [scale * torch.randn(n, dtype=torch.float64) for _ in range(4)]


# the functions of four log-probabilities, and the module that holds each of them
MODULES = {"preference_logits": dpo, "implicit_rewards": dpo, "dpo_loss": dpo, "cdpo_loss": losses,
           "robust_loss": losses, "ipo_loss": losses, "hinge_loss": losses}


def for_each(names, **kind):
    """Parametrises a test by names of functions. Each case is a proof that grades its function."""
    cases = [pytest.param(name, marks=grades(name, **kind)) for name in names]
    return pytest.mark.parametrize("name", cases)


# ---- Eq. 7

@grades("preference_logits")
def test_h_is_the_policys_log_ratio_minus_the_references():
    """h = [log pi(y_w) - log pi(y_l)] - [log ref(y_w) - log ref(y_l)]: Eq. 7 without beta."""
    w, l, rw, rl = four()
    rows = zip(w.tolist(), l.tolist(), rw.tolist(), rl.tolist())
    want = vector(*[a - b - c + d for a, b, c, d in rows])
    assert_same(dpo.preference_logits(w, l, rw, rl), want, 1e-12, {
        "the reference is ignored": w - l,
        "this is the reference's log-ratio alone": [rw - rl, rl - rw],
        "the reference's log-ratio has the wrong sign": (w - l) + (rw - rl),
        "chosen and rejected are swapped, or policy and reference": (l - w) - (rl - rw),
        "chosen and rejected are swapped in the policy's log-ratio alone": (l - w) - (rw - rl),
        "h is multiplied by beta = 0.1, but h has no beta": 0.1 * want,
        "brackets are missing: the reference's log-ratio is subtracted as a whole":
            (w - l) - rw - rl,
        "this is the chosen response's log-ratio alone": w - rw,
        "the rejected response's reference is missing": (w - rw) - l,
        "the chosen response's reference is missing": w - (l - rl),
        "the two log-ratios are added; wanted their difference": (w - rw) + (l - rl),
        "negative values are cut off at 0. Then a pair that is ranked wrongly looks like a tie":
            want.clamp(min=0),
        "the batch's mean is subtracted": want - want.mean(),
        "this is the absolute value of h. Its sign says which response is preferred": want.abs(),
        "this is the mean over the batch; wanted one number for each pair, (B,)": want.mean(),
        "this is the sum over the batch; wanted one number for each pair, (B,)": want.sum(),
        "these are probabilities, not log-probabilities; wanted differences of the arguments":
            (w.exp() - l.exp()) - (rw.exp() - rl.exp()),
    }, what="h")


@grades("preference_logits")
def test_h_of_long_responses():
    """Log-probabilities of -2000 are ordinary: a long response has one. exp of them is 0."""
    got = dpo.preference_logits(*vector(-2000, -2001, -2002, -2000)[:, None])
    if not got.isfinite().all():
        raise Mistake(f"h of long responses is {got.item()}; wanted 3. exp of a log-probability "
                      "underflows. Stay with logarithms")
    assert_same(got, vector(3.0), 1e-12, what="h of long responses")


@grades("preference_logits")
def test_h_can_be_trained():
    """dh/dlog pi(y_w) = 1 and dh/dlog pi(y_l) = -1, exactly."""
    w, l, rw, rl = four(3)
    w, l = w.requires_grad_(), l.requires_grad_()
    check_slope(dpo.preference_logits(w, l, rw, rl), w, l, torch.ones(3).double(), what="h")


@grades("implicit_rewards")
@pytest.mark.parametrize("beta", [0.3, 0.1, 1.7])
def test_implicit_rewards_are_beta_times_the_log_ratio(beta):
    """r^ = beta log(pi/ref), section 4, for chosen and for rejected, to 1e-12."""
    logps = four(scale=2)
    chosen, rejected = dpo.implicit_rewards(*logps, beta)
    check_rewards(chosen, rejected, logps, beta)


@grades("implicit_rewards")
def test_implicit_rewards_carry_no_gradient():
    """They are for looking at, and no gradient flows through them."""
    check_detached(lambda *logps: dpo.implicit_rewards(*logps, 0.1))


@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.3, 0.1, 1.7])
def test_the_loss_is_minus_log_sigma_of_beta_h(beta):
    """Eq. 7 on 50 random pairs, compared with log1p and exp."""
    w, l, rw, rl = four(scale=2)
    want = softplus(-beta * ((w - l) - (rw - rl)))
    assert_same(dpo.dpo_loss(w, l, rw, rl, beta=beta)[0], want, 1e-12,
                loss_mistakes(w, l, rw, rl, beta), what="the loss")


@grades("dpo_loss")
def test_the_gradient_of_the_loss_by_hand():
    """dL/dlog pi(y_w) = -beta sigma(-beta h), and the opposite at log pi(y_l), to 1e-12."""
    w, l, rw, rl = four(scale=2)
    w, l = w.requires_grad_(), l.requires_grad_()
    h = ((w - l) - (rw - rl)).detach()
    check_slope(dpo.dpo_loss(w, l, rw, rl, beta=0.3)[0], w, l, -0.3 / (1 + torch.exp(0.3 * h)))


@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.3, 0.1, 1.7])
def test_the_rewards_are_beta_times_the_log_ratio(beta):
    """The rewards of dpo_loss are r^ = beta log(pi/ref), section 4, for chosen and rejected."""
    logps = four(scale=2)
    _, chosen, rejected = dpo.dpo_loss(*logps, beta=beta)
    check_rewards(chosen, rejected, logps, beta)


@grades("dpo_loss")
def test_the_rewards_carry_no_gradient():
    """The rewards are for looking at. A reward with a gradient keeps its activations in memory, or
    is trained by mistake."""
    check_detached(lambda *logps: dpo.dpo_loss(*logps, beta=0.1)[1:])


def check_wide_margin(loss, formula):
    """The losses at beta h = 1.5, -1000 and 1000 in float32, beta = 1/2, compared with formula(h).

    If the first one is right, and another one is not, the logarithm was taken of a number that is
    too small for a float, or that was clipped.
    """
    h, zero = torch.tensor([3.0, -2000.0, 2000.0]), torch.zeros(3)
    got, want = loss(h, zero, zero, zero, beta=0.5)[0].detach(), formula(h.double())
    if got.shape == want.shape and abs(got[0] - want[0]) < 1e-5:
        for value, right, beta_h in zip(got[1:].tolist(), want[1:].tolist(), (-1000, 1000)):
            if not math.isfinite(value):
                raise Mistake(f"the loss at beta h = {beta_h} is {value}; wanted {right:g}. Does "
                              "log(sigmoid(x)) underflow, or exp overflow? logsigmoid does neither")
            if abs(value - right) > 1:
                raise Mistake(f"the loss at beta h = {beta_h} is {value:.4g}; wanted {right:g}. Is "
                              "something clipped, or added, before the log? Take logsigmoid")
    assert_same(got.double(), want, 1e-6, what="the losses at beta h = 1.5, -1000 and 1000")


@grades("dpo_loss")
def test_a_pair_that_is_ranked_wrongly_by_far():
    """beta h = -1000: the loss is 1000 (float32, 1e-6), and its slope is -beta, not nan."""
    check_wide_margin(dpo.dpo_loss, lambda h: softplus(-h / 2))
    x, zero = torch.tensor([-2000.0], requires_grad=True), torch.zeros(1)
    loss = dpo.dpo_loss(x, zero, zero, zero, beta=0.5)[0]
    slope = torch.autograd.grad(loss.sum(), x)[0]
    assert_same(slope, torch.tensor([-0.5]), 1e-6, what="its slope")


@grades("dpo_loss")
@given(numbers(4, 50), betas)
def test_the_loss_is_minus_log_sigma_of_the_reward_margin(logps, beta):
    """This is true of every pair and every beta, to 1e-10 (1e-10 beta for beta > 1). With rewards
    that lack beta, or have it twice, it is true at beta = 1 only."""
    loss, chosen, rejected = dpo.dpo_loss(*logps[:, None], beta=beta)
    assert_same(loss, softplus(rejected - chosen), 1e-10 * max(1, beta),
                what="the loss, compared with the margin of the rewards")


@grades("dpo_loss")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6),
                                              (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@given(h=st.floats(-1e4, 1e4, width=16), beta=st.sampled_from([0.25, 1.0, 2.0]))
def test_finite_and_right_at_extreme_margins(dtype, tolerance, h, beta):
    """Margins up to +-1e4 in every precision.

    The loss is log(1 + e^(-beta h)), up to the rounding of the precision, and its slope is finite.
    log(sigmoid(x)) underflows to -inf. logsigmoid does not.
    """
    x = torch.tensor([h], dtype=dtype, requires_grad=True)
    zero = torch.zeros(1, dtype=dtype)
    loss = dpo.dpo_loss(x, zero, zero, zero, beta=beta)[0]
    exact = x.detach().double()
    assert_same(loss.detach().double(), softplus(-beta * exact), tolerance,
                what=f"the loss at h = {h:g}, beta = {beta:g} in {dtype}")
    slope = torch.autograd.grad(loss.sum(), x)[0]
    assert_same(slope.double(), -beta * torch.sigmoid(-beta * exact), 2 * tolerance,
                what=f"the slope at h = {h:g}, beta = {beta:g} in {dtype}")


def assert_beta_refused(name, beta):
    return assert_refused(getattr(MODULES[name], name), *torch.zeros(4, 1), beta=beta)


def assert_shapes_refused(name, place):
    """The argument at this place has the shape (3,1), the three others (3,)."""
    logps = [torch.zeros(3) for _ in range(4)]
    logps[place] = torch.zeros(3, 1)
    return assert_refused(getattr(MODULES[name], name), *logps,
                              **({"beta": 0.1} if name == "implicit_rewards" else {}))


WITH_BETA = [name for name in MODULES if name != "preference_logits"]
WITH_SHAPES = [name for name in MODULES if name != "implicit_rewards"]


@for_each(WITH_BETA, guard="beta <= 0")
@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_settings_that_mean_nothing_are_refused(name, beta):
    """beta = 0 ties the policy to nothing. A ValueError is raised."""
    assert_beta_refused(name, beta)


@for_each(WITH_BETA, guard="beta = nan")
def test_a_beta_that_is_no_number_is_refused(name):
    """nan is not positive: a ValueError is raised. `if beta <= 0` lets it through."""
    assert_beta_refused(name, math.nan)


@for_each(WITH_SHAPES, guard="shapes (B,) with (B,1)")
@pytest.mark.parametrize("place", range(4))
def test_shapes_that_would_broadcast_are_refused(name, place):
    """(3,) beside (3,1) would broadcast to (3,3) and train on pairs that do not exist. A ValueError
    is raised."""
    assert_shapes_refused(name, place)


@pytest.mark.parametrize("name", WITH_BETA)
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_the_assert_beta_refused_names_the_value(name, beta):
    """The message of the project's own ValueError."""
    assert f"beta={beta}" in assert_beta_refused(name, beta)


@pytest.mark.parametrize("name", WITH_SHAPES)
def test_the_assert_shapes_refused_shows_them(name):
    """The message of the project's own ValueError."""
    for place in range(4):
        assert "(3, 1)" in assert_shapes_refused(name, place)


@grades("dpo_loss")
def test_defaults_are_plain_dpo_at_beta_one_tenth():
    """Without options the loss is Eq. 7 with beta = 0.1."""
    w, l, rw, rl = four()
    h = (w - l) - (rw - rl)
    assert_same(dpo.dpo_loss(w, l, rw, rl)[0], softplus(-0.1 * h), 1e-12, {
        "without options, beta is 0.1. Yours has another default":
            [softplus(-beta * h) for beta in (1, 0.5, 0.05, 0.01, 0.2)],
    }, what="the loss without options")


# ---- What the loss means

@grades("dpo_loss")
def test_at_the_reference_the_loss_is_ln2_and_the_gradient_is_not_zero():
    """Claim 8. At pi = ref the loss is ln 2, the rewards are 0, and the gradient is
    -(beta/2)(grad log pi_w - grad log pi_l).

    The loss, and its gradient by autograd, are compared with these numbers, to 1e-15.
    """
    w, l, rw, rl = four(4)
    w, l = rw.clone().requires_grad_(), rl.clone().requires_grad_()
    loss, chosen, rejected = dpo.dpo_loss(w, l, rw, rl, beta=0.3)
    assert_same(loss.detach(), torch.full_like(rw, LN2), 1e-15, what="the loss at pi = ref")
    assert not chosen.any() and not rejected.any(), (
        "at pi = ref every implicit reward is exactly 0")
    grad_w, grad_l = torch.autograd.grad(loss.sum(), (w, l))
    assert_same(grad_w, torch.full_like(rw, -0.15), 1e-15, what="dL/dlog pi(y_w)")
    assert_same(grad_l, torch.full_like(rl, 0.15), 1e-15, what="dL/dlog pi(y_l)")


@grades("dpo_loss")
@given(numbers(4, 20), st.floats(-50, 50), betas)
def test_the_reference_matters_through_its_log_ratio_only(logps, c, beta):
    """Claim 10. c(x) added to both reference log-probabilities changes nothing. Added to one of
    them it changes h, and so the loss.

    The loss with c(x) is compared with the loss without it, to 1e-10 (1e-10 beta for beta > 1).
    """
    w, l, rw, rl = logps[:, None]
    loss = dpo.dpo_loss(w, l, rw, rl, beta=beta)[0]
    shifted = dpo.dpo_loss(w, l, rw + c, rl + c, beta=beta)[0]
    assert_same(shifted, loss, 1e-10 * max(1, beta), what="the loss with c(x) added to both")
    h = ((w - l) - (rw - rl)).item()
    assume(abs(beta * h) < 10 and beta > 0.01)  # where sigma is flat, no change can be seen
    assert dpo.dpo_loss(w, l, rw + 1, rl, beta=beta)[0] > loss, (
        "a reference that likes the chosen response better must raise the loss. Either the "
        "reference is ignored, which is another loss, CPO, or it has the wrong sign")


@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_the_minimiser_over_all_pairs_is_the_optimal_policy(beta):
    """Claim 11. All ordered pairs of ref x ref, with exact Bradley-Terry labels.

    The gradient at pi* is zero (1e-12). LBFGS starts at the reference and ends within a total
    variation of 1e-8 from pi* = ref exp(r/beta)/Z, which the loss never saw.
    """
    ref, reward = tabular.random_world(6)
    preference, star = tabular.preferences(reward), world.optimal_policy(ref, reward, beta)

    def loss(theta):
        return tabular.population_loss(torch.log_softmax(theta, -1), ref, preference, beta)

    theta = star.clone().requires_grad_()
    assert torch.autograd.grad(loss(theta), theta)[0].abs().max() < 1e-12, (
        "the gradient at pi* is not zero: the optimum of this loss is another policy")
    found = torch.log_softmax(tabular.minimise(loss, ref), -1)
    assert tabular.total_variation(ref, star) > 1e-3, (
        "ref and pi* are too close: the test would show nothing")
    distance = tabular.total_variation(found, star).item()
    assert distance < 1e-8, f"the minimiser is {distance:.2g} in total variation from pi*"


@grades("dpo_loss")
@given(worlds(policies=1), st.floats(-1, 1).map(lambda e: 10 ** e))
def test_the_excess_loss_is_a_kl_between_preferences(drawn, beta):
    """Claim 12. L(pi) - L(pi*) = E[KL(Bernoulli p* || Bernoulli p_pi)].

    The least loss is the entropy of the labels. So a loss above zero is no failure. Both are
    compared with plain sums over all pairs, to 1e-9.
    """
    ref, reward, pi = drawn
    reward = reward / 3
    p_star, q = tabular.preferences(reward), ref.exp()
    s = beta * ((pi - ref)[:, None] - (pi - ref)[None, :])

    def plogp(p):
        return torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0)

    drawn_pairs = q[:, None] * q[None, :]
    entropy = -(drawn_pairs * (plogp(p_star) + plogp(1 - p_star))).sum()
    excess = (drawn_pairs * (plogp(p_star) + plogp(1 - p_star)
                             + p_star * softplus(-s) + (1 - p_star) * softplus(s))).sum()
    star = world.optimal_policy(ref, reward, beta)
    least = tabular.population_loss(star, ref, p_star, beta)
    assert_same(least, entropy, 1e-9, what="the loss at pi*")
    assert_same(tabular.population_loss(pi, ref, p_star, beta) - least, excess, 1e-9,
                what="the excess loss")
    assert excess > -1e-12, f"a KL is never negative, but this one is {excess:g}"


def test_plackett_luce_over_all_rankings():
    """Claim 13 (Eq. 18 and 20). The probabilities of the 4! rankings sum to 1.

    Summed over the rankings with i before j they give sigma(r_i - r_j). For two responses the
    ranking loss is Eq. 7. Every probability is compared with a plain product, to 1e-12.
    """
    ref, reward = tabular.random_world(4)
    rankings = list(itertools.permutations(range(4)))

    def by_hand(ranking):
        p = 1.0
        for k, a in enumerate(ranking):
            p *= math.exp(reward[a]) / sum(math.exp(reward[b]) for b in ranking[k:])
        return p

    p = {}
    for ranking in rankings:
        p[ranking] = tabular.plackett_luce(reward, list(ranking)).exp().item()
        assert p[ranking] == pytest.approx(by_hand(ranking), abs=1e-12)
    assert sum(p.values()) == pytest.approx(1, abs=1e-12)

    for i, j in itertools.permutations(range(4), 2):
        before = sum(p[ranking] for ranking in rankings if ranking.index(i) < ranking.index(j))
        assert before == pytest.approx(1 / (1 + math.exp(reward[j] - reward[i])), abs=1e-12)
    pi = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)
    h = (pi[2] - pi[1]) - (ref[2] - ref[1])
    assert_same(tabular.plackett_luce_loss(pi, ref, [2, 1], beta=0.4), softplus(-0.4 * h), 1e-12,
                what="Eq. 20 for two responses")


# ---- How fast, and how far

@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("time, steps", [(0.3, 40), (5.0, 200)])
def test_one_deterministic_pair_grows_without_bound(beta, time, steps):
    """Claim 14. Gradient flow on the logits of one pair whose label is always the same.

    e^(beta h) + beta h = 1 + 2 beta^2 t, so h grows without bound, as a logarithm. The flow of the
    code's loss, by Runge-Kutta, is compared with this solution by hand, to 1e-7.
    """
    ref = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)

    def loss(theta):
        logps = torch.log_softmax(theta, -1)
        return dpo.dpo_loss(logps[:1], logps[1:2], ref[:1], ref[1:2], beta=beta)[0].sum()

    theta = tabular.gradient_flow(loss, ref, time, steps)
    h = (theta[0] - theta[1]) - (ref[0] - ref[1])
    assert_same(torch.exp(beta * h) + beta * h, vector(1 + 2 * beta ** 2 * time)[0], 1e-7,
                what="e^(beta h) + beta h")
    assert h > 0, f"h = {h:g}, but the chosen response must gain on the rejected one"


def test_gradient_flow_is_the_method_of_runge_and_kutta():
    """On the loss -20 theta^2, a step of length dt multiplies theta by the first five terms of
    e^x, x = 40 dt. The default is 400 steps. Compared to 1e-12."""
    x = 40 * 1.0 / 400
    factor = sum(x ** n / math.factorial(n) for n in range(5))
    start = vector(1.0, -2.0)
    flow = tabular.gradient_flow(lambda theta: -20 * (theta ** 2).sum(), start, time=1.0)
    assert_same(flow, start * factor ** 400, 1e-12, {
        "theta climbs, but the flow goes down": start * (2 - factor) ** 400}, what="theta")


def test_without_the_weight_the_margin_grows_linearly():
    """Claim 15. The same pair without the weight sigma(r^_l - r^_w), that is, with the loss
    -beta h.

    Then h = 2 beta t grows for ever at one speed. The flow, by Runge-Kutta, is compared with this
    line, to 1e-10. The weight is what slows a pair down once it is ranked rightly (section 4).
    """
    beta, time = 0.5, 5.0
    ref = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)

    def h_of(theta):
        return (theta[0] - theta[1]) - (ref[0] - ref[1])

    def unweighted_loss(theta):
        return -beta * h_of(torch.log_softmax(theta, -1))

    def loss(theta):
        return softplus(-beta * h_of(torch.log_softmax(theta, -1)))

    theta = tabular.gradient_flow(unweighted_loss, ref, time)
    assert_same(h_of(theta), vector(2 * beta * time)[0], 1e-10, what="h without the weight")
    weighted = tabular.gradient_flow(loss, ref, time)
    assert 0 < h_of(weighted) < h_of(theta) / 2, (
        "with the weight, h must grow too, but less than half as far")


@grades("dpo_loss")
def test_the_curvature_is_a_graph_laplacian():
    """Claim 16. The Hessian in the logits is beta^2 times the Laplacian of the comparison graph.

    The edge weights are mu_ij sigma(beta h) sigma(-beta h). So the Hessian is positive
    semidefinite, with a null vector for every component of the graph. Here there are two. The
    Hessian by autograd is compared with the Laplacian, to 1e-12. And gradient descent contracts at
    1 - eta lambda_2 near the optimum: its steps are compared with this rate, to 1e-3.
    """
    n, beta = 6, 0.7
    ref, reward = tabular.random_world(n)
    preference = tabular.preferences(reward)
    drawn = torch.rand(n, n, dtype=torch.float64)
    drawn = torch.triu(drawn, 1) + torch.triu(drawn, 1).T
    apart = torch.arange(n) < 4  # responses 0 to 3 are never compared with 4 and 5
    drawn = torch.where(apart[:, None] == apart[None, :], drawn, 0.0)
    drawn = drawn / drawn.sum()

    def loss_on(mu):
        def loss(theta):
            logps = torch.log_softmax(theta, -1)
            return tabular.population_loss(logps, ref, preference, beta, mu)
        return loss

    theta = torch.randn(n, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(loss_on(drawn), theta)
    h = (theta - ref)[:, None] - (theta - ref)[None, :]
    # sigma(x) sigma(-x) is even: both labels of a comparison have the same curvature, so the
    # noise of the labels does not matter here
    weights = 2 * drawn * torch.sigmoid(beta * h) * torch.sigmoid(-beta * h)
    assert_same(hessian, beta ** 2 * tabular.laplacian(weights), 1e-12, what="the Hessian")
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert eigenvalues.min() > -1e-12 and (eigenvalues < 1e-10).sum() == 2, (
        f"the eigenvalues must be two zeros and four positive numbers: {eigenvalues.tolist()}")
    for component in (apart.double(), (~apart).double()):
        assert (hessian @ component).abs().max() < 1e-12, (
            "a shift that is common to a component of the graph must not change the loss")

    # the rate of gradient descent, on a graph that is connected
    drawn = torch.ones(n, n, dtype=torch.float64) / n ** 2
    loss = loss_on(drawn)
    star = world.optimal_policy(ref, reward, beta)
    hessian = torch.autograd.functional.hessian(loss, star)
    eigenvalues, directions = torch.linalg.eigh(hessian)
    eta = 0.9 / eigenvalues[-1]
    # the start is equally far from pi* in every direction that changes the loss
    theta = star + 1e-4 * directions[:, 1:].sum(-1)
    slowest = []  # what is left in the direction that shrinks the slowest, after each step
    for _ in range(40):
        leaf = theta.clone().requires_grad_()
        theta = theta - eta * torch.autograd.grad(loss(leaf), leaf)[0]
        slowest.append((theta - star) @ directions[:, 1])
    assert_same(slowest[3] / slowest[2], 1 - eta * eigenvalues[1], 1e-3,
                what="what a step leaves of the slowest direction")
    left = (theta - star - (theta - star).mean()).norm()
    bound = 2 * 1e-4 * (n - 1) ** 0.5 * (1 - eta * eigenvalues[1]) ** 40 + 1e-12
    assert left < bound, f"after 40 steps the distance to pi* is {left:.2g}, wanted {bound:.2g}"


def test_regressing_reward_differences_has_the_same_target_and_more_curvature():
    """Claim 17. The loss (beta h - (r_i - r_j))^2 / 2 also ends at pi*.

    LBFGS ends within a total variation of 1e-8 from pi*. The Hessian by autograd is compared with
    beta^2 Laplacian(mu), to 1e-12. In every direction it is at least four times the Hessian of DPO.
    So the target is the same and the speed is another.
    """
    n, beta = 5, 0.7
    ref, reward = tabular.random_world(n)
    drawn = (ref.exp()[:, None] * ref.exp()[None, :]).fill_diagonal_(0)
    preference = tabular.preferences(reward)

    def difference(v):
        return v[:, None] - v[None, :]

    def regression(theta):
        implicit = beta * difference(torch.log_softmax(theta, -1) - ref)
        return (drawn * (implicit - difference(reward)) ** 2 / 2).sum()

    def loss(theta):
        return tabular.population_loss(torch.log_softmax(theta, -1), ref, preference, beta)

    star = world.optimal_policy(ref, reward, beta)
    found = torch.log_softmax(tabular.minimise(regression, ref), -1)
    assert tabular.total_variation(found, star) < 1e-8, "the regression does not end at pi*"
    hessian = torch.autograd.functional.hessian(regression, star)
    assert_same(hessian, beta ** 2 * tabular.laplacian(2 * drawn), 1e-12,
                what="the Hessian of the regression")
    for theta in (ref, star, torch.randn(n, dtype=torch.float64)):
        gap = torch.linalg.eigvalsh(hessian - 4 * torch.autograd.functional.hessian(loss, theta))
        assert gap.min() > -1e-12, (
            "in some direction the regression curves less than four times as much as DPO, but "
            "sigma(x) sigma(-x) is at most 1/4")
    at_ref = torch.autograd.functional.hessian(loss, ref)
    assert_same(hessian, 4 * at_ref, 1e-12,
                what="the Hessian of the regression, compared with four times DPO's at the "
                     "reference, where sigma(0) = 1/2,")


# ---- The gradient: the weight, the analytic form, and the check

@grades("gradient_weight")
def test_the_weight_of_some_pairs():
    """Section 4. The weight is sigma(r^_l - r^_w), for 50 random pairs, to 1e-12."""
    chosen, rejected = 2 * torch.randn(2, 50, dtype=torch.float64)

    def sigma(x):
        return 1 / (1 + torch.exp(-x))

    want = sigma(rejected - chosen)
    assert_same(dpo.gradient_weight(chosen, rejected), want, 1e-12, {
        "the sign is flipped. sigma(r^_l - r^_w) is large where the pair is ranked WRONGLY":
            sigma(chosen - rejected),
        "this takes the absolute value of the margin. Its sign says whether the pair is ranked "
        "rightly": [sigma((chosen - rejected).abs()), sigma(-(chosen - rejected).abs())],
        "this is the log of the weight": -softplus(chosen - rejected),
        "this is the slope of sigma; wanted sigma itself": want * (1 - want),
        "this is the loss; wanted the weight": softplus(rejected - chosen),
        "the weight is negative. The minus sign of the gradient is not part of it": -want,
        "every pair has the same weight": [torch.ones_like(want), 0.5 * torch.ones_like(want)],
        "the rejected reward is missing": [sigma(-chosen), sigma(chosen)],
        "the chosen reward is missing": [sigma(rejected), sigma(-rejected)],
        "the rewards are added; wanted their difference": [sigma(rejected + chosen),
                                                           sigma(-rejected - chosen)],
        "it is a step from 0 to 1; wanted sigma": (rejected > chosen).double(),
        "it is twice too large: a tie has the weight 1/2": 2 * want,
        "this is tanh; wanted sigma": torch.tanh(rejected - chosen),
        "sigma is missing. This is the margin": [rejected - chosen, chosen - rejected],
        "sigma is of the difference, not a difference of sigmas":
            [sigma(rejected) - sigma(chosen), sigma(chosen) - sigma(rejected)],
        "this is the mean over the batch; wanted the weight of each pair, (B,)": want.mean(),
        "this is the sum over the batch; wanted the weight of each pair, (B,)": want.sum(),
        "beta is in the rewards already": [sigma(0.1 * (rejected - chosen)), 0.1 * want],
        "this is a softmax over the batch; wanted sigma of each pair":
            torch.softmax(rejected - chosen, -1),
    }, what="the weight")


@grades("gradient_weight")
@given(numbers(2, 30))
def test_the_weight_is_sigma_of_rejected_minus_chosen(rewards):
    """Section 4. The weight is near 1 where the implicit reward ranks the pair wrongly, and 1/2
    where both rewards are equal. For all rewards, to 1e-12."""
    chosen, rejected = rewards[:, None]
    assert_same(dpo.gradient_weight(chosen, rejected), 1 / (1 + torch.exp(chosen - rejected)),
                1e-12, what="the weight")


@grades("gradient_weight")
def test_the_weight_at_no_difference_and_at_extremes():
    """The weight is 1/2 at the reference (claim 8). At margins of +-1e4 it is 0 and 1, and for two
    equal rewards of +-1e4 it is 1/2, not nan."""
    chosen, rejected = vector(0, 3, 1e4, -1e4, 1e4, -1e4), vector(0, 3, 0, 0, 1e4, -1e4)
    got = dpo.gradient_weight(chosen, rejected)
    if got.isnan().any():
        raise Mistake("the weight of large rewards is nan. exp overflows, so subtract first")
    assert_same(got, vector(0.5, 0.5, 0, 1, 0.5, 0.5), 1e-12, what="the weight")


def pairs_by_hand(policy, batch):
    """For each pair: log pi(y_w), its gradient, log pi(y_l), its gradient, and log ref of both.

    It goes through one sequence at a time, token by token, and uses nothing of dpo.py. A gradient
    is one vector, flattened over all parameters.
    """
    params, size, pairs = list(policy.parameters()), len(batch["tokens"]) // 2, []
    for i in range(size):
        pair = []
        for row in (i, i + size):
            tokens, mask = batch["tokens"][row], batch["response_mask"][row]
            logits = policy(tokens[None])[0]
            logp = 0.0
            for t in range(len(tokens)):
                if mask[t]:
                    logp = logp + torch.log_softmax(logits[t - 1], -1)[tokens[t]]
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(logp, params)])
            pair += [logp.item(), gradient]
        ref = batch["ref_chosen_logps"][i].item(), batch["ref_rejected_logps"][i].item()
        pairs.append((*pair, *ref))
    return pairs


def weighted_gradient(pairs, beta, weight):
    """-beta mean[weight(r^_w, r^_l) (grad log pi_w - grad log pi_l)], flattened."""
    terms = []
    for w, grad_w, l, grad_l, rw, rl in pairs:
        factor = weight(beta * (w - rw), beta * (l - rl))
        terms.append(-beta * factor * (grad_w - grad_l))
    return sum(terms) / len(terms)


@grades("analytic_gradient")
@pytest.mark.parametrize("beta", [0.3, 0.7])
def test_analytic_gradient_against_one_pair_at_a_time(tiny, beta):
    """Claim 9 (section 4). The analytic gradient is compared with a sum over single pairs.

    The sum uses neither the loss nor the batch. For each pair the two gradients and the weight are
    computed by hand. To 1e-12.
    """
    def sigma(x):
        return 1 / (1 + math.exp(-x))

    def mistake(weight, scale=1):
        return scale * weighted_gradient(pairs, beta, weight)

    def with_reference(factor):
        others = [(*pair[:4], factor * pair[4], factor * pair[5]) for pair in pairs]
        return weighted_gradient(others, beta, lambda chosen, rejected: sigma(rejected - chosen))

    pairs = pairs_by_hand(*tiny)
    of_chosen = of_rejected = through_the_weight = mean_weight = 0.0
    for w, grad_w, l, grad_l, rw, rl in pairs:
        weight = sigma(beta * (l - rl - w + rw))
        mean_weight += weight / 3
        of_chosen = of_chosen - beta * weight * grad_w / 3
        of_rejected = of_rejected + beta * weight * grad_l / 3
        # d(weight (w - l)) = weight (dw - dl) - beta weight (1 - weight) (w - l) (dw - dl)
        factor = weight - beta * weight * (1 - weight) * (w - l)
        through_the_weight = through_the_weight - beta * factor * (grad_w - grad_l) / 3

    gradient = dpo.analytic_gradient(*tiny, beta)
    shapes = [tuple(p.shape) for p in tiny[0].parameters()]
    if not isinstance(gradient, list | tuple) or [tuple(g.shape) for g in gradient] != shapes:
        raise Mistake("wanted a list of tensors, one for each parameter, in the order of "
                      "policy.parameters()")
    want = weighted_gradient(pairs, beta, lambda w, l: sigma(l - w))
    assert_same(torch.cat([g.flatten() for g in gradient]), want, 1e-12, {
        "the weight's sign is flipped. The weight is sigma(r^_l - r^_w), large for pairs that "
        "are ranked wrongly": mistake(lambda w, l: sigma(w - l)),
        "the weight is missing": mistake(lambda w, l: 1),
        "the weight takes the absolute value of the margin":
            [mistake(lambda w, l: sigma(abs(w - l))), mistake(lambda w, l: sigma(-abs(w - l)))],
        "a detach is missing: the gradient flows through the weight too": through_the_weight,
        "the gradient of the rejected response is missing. Is its log-probability detached?":
            of_chosen,
        "the gradient of the chosen response is missing. Is its log-probability detached?":
            of_rejected,
        "the weight lacks beta. It is sigma of a difference of rewards, and a reward contains "
        "beta": mistake(lambda w, l: sigma((l - w) / beta)),
        "the factor beta is missing": mistake(lambda w, l: sigma(l - w), 1 / beta),
        "the factor beta is there twice": mistake(lambda w, l: sigma(l - w), beta),
        "it is divided by beta; the factor is beta": mistake(lambda w, l: sigma(l - w), beta ** -2),
        "the factor is 0.1 instead of beta": mistake(lambda w, l: sigma(l - w), 0.1 / beta),
        "beta is hard-coded as 0.1":
            mistake(lambda w, l: sigma((l - w) * 0.1 / beta), 0.1 / beta),
        "the weight is there twice": mistake(lambda w, l: sigma(l - w) ** 2),
        "the reference's sign is wrong in the weight": with_reference(-1),
        "the mean weight multiplies the mean gradient; wanted the mean of their products":
            mistake(lambda w, l: 1) * mean_weight,
        "the weight contains beta twice. The rewards have it already":
            mistake(lambda w, l: sigma(beta * (l - w))),
        "the reference is ignored in the weight": with_reference(0),
        "this is the mean over all 2B rows; wanted the mean over B pairs":
            mistake(lambda w, l: sigma(l - w), 0.5),
        "the minus sign is missing, or chosen and rejected are swapped. This vector points where "
        "the loss falls":
            mistake(lambda w, l: sigma(l - w), -1),
        "this is a sum over pairs; wanted the mean": mistake(lambda w, l: sigma(l - w), 3),
        "the gradients of chosen and rejected are added; wanted their difference":
            of_chosen - of_rejected,
    }, what="the gradient")


@grades("analytic_gradient")
def test_analytic_gradient_is_autograd_of_the_loss(tiny):
    """Claim 9. PyTorch's gradient of the mean of Eq. 7, which is written out here, is the same. To
    1e-9."""
    policy, batch = tiny
    beta, params = 0.7, list(policy.parameters())
    logps = torch.log_softmax(policy(batch["tokens"])[:, :-1], -1)
    logps = logps.gather(2, batch["tokens"][:, 1:, None]).squeeze(2)
    logps = (logps * batch["response_mask"][:, 1:]).sum(1)
    h = (logps[:3] - logps[3:]) - (batch["ref_chosen_logps"] - batch["ref_rejected_logps"])
    autograd = torch.autograd.grad(softplus(-beta * h).mean(), params)
    for ours, theirs in zip(dpo.analytic_gradient(policy, batch, beta), autograd, strict=True):
        assert theirs.abs().max() > 1e-6, "the gradient is zero: this comparison shows nothing"
        assert_same(ours, theirs, 1e-9, what="the gradient of a parameter")


@grades("analytic_gradient")
def test_any_module_that_maps_tokens_to_logits_will_do(tiny):
    """The policy need not be a model.GPT. A module without hidden() and head has the same gradient
    (1e-12)."""
    policy, batch = tiny
    bare = dpo.analytic_gradient(Bare(policy), batch, 0.7)
    for a, b in zip(bare, dpo.analytic_gradient(policy, batch, 0.7), strict=True):
        assert_same(a, b, 1e-12, what="the gradient of a module without hidden()")


@grades("central_differences")
def test_central_differences_of_a_cubic():
    """d(x^3)/dx = 3x^2, to 1e-8. The error of central differences is eps^2. The error of one-sided
    differences is eps."""
    for eps in (1e-3, 1e-5):
        start, x = vector(1.0, -2.0, 0.5), vector(1.0, -2.0, 0.5)
        right = 3 * start ** 2
        got = dpo.central_differences(lambda: (x ** 3).sum(), x, eps)
        assert_same(got, right + eps ** 2, 1e-9, {
            "the result is twice too large: divide (up - down) by 2 eps":
                2 * right + 2 * eps ** 2,
            "the result is half of it: divide (up - down) by 2 eps": (right + eps ** 2) / 2,
            "the sign is flipped: (up - down), not (down - up)": -right - eps ** 2,
            "the difference is not divided by 2 eps": 2 * eps * (right + eps ** 2),
            "it is divided by eps once too often": (right + eps ** 2) / eps,
            "it is multiplied by eps. (up - down) / 2 * eps is not (up - down) / (2 * eps)":
                [eps * (right + eps ** 2) * factor for factor in (eps, 1)],
            "these are one-sided differences, divided by 2 eps: move the entry both ways":
                [(right + sign * 3 * start * eps + eps ** 2) / 2 for sign in (1, -1)],
            "all are zero. Does f see both steps? They go into x itself, one up and one down":
                torch.zeros(3).double(),
            "the argument eps is ignored": right + 1e-10,
            "one number for all entries: all of them move at once":
                (right + eps ** 2).sum().expand(3),
            "the first entry is left out": (right + eps ** 2) * vector(0, 1, 1),
            "the last entry is left out": (right + eps ** 2) * vector(1, 1, 0),
            "only the first entry is computed. Is the return inside the loop?":
                (right + eps ** 2) * vector(1, 0, 0),
            "the sign is lost": (right + eps ** 2).abs(),
            "these are one-sided differences: move the entry both ways":
                [right + sign * 3 * start * eps + eps ** 2 for sign in (1, -1)],
        }, what="the differences")
        if not torch.equal(x, start):
            raise Mistake("x has changed: put every entry back as it was")
    matrix = torch.randn(2, 3, dtype=torch.float64)
    assert_same(dpo.central_differences(lambda: (matrix ** 2).sum(), matrix), 2 * matrix, 1e-8,
                what="the differences of a matrix")


@grades("central_differences")
def test_central_differences_of_a_parameter():
    """x may require a gradient, as parameters do. It is moved in place, and autograd does not
    notice. The default eps is 1e-5."""
    x = torch.nn.Parameter(vector(0.5, -1.0))
    asked = []

    def f():
        asked.append(x.detach().clone())
        return (x ** 2).sum()

    assert_same(dpo.central_differences(f, x), 2 * x.detach(), 1e-8, what="the differences")
    moves = torch.stack(asked) - x.detach()
    largest = moves.abs().max().item()
    if largest != pytest.approx(1e-5, rel=1e-6):
        raise Mistake(f"an entry was moved by {largest:g}; wanted eps = 1e-5, both ways")


@grades("central_differences", cost=True)
def test_central_differences_ask_twice_for_each_entry():
    """f is evaluated twice for each entry of x, and not more often: f may be a whole model."""
    x, asked = vector(0.5, -1.0), []

    def f():
        asked.append(1)
        return (x ** 2).sum()

    dpo.central_differences(f, x)
    assert len(asked) == 4, f"f was evaluated {len(asked)} times, 4 are needed"


@grades("gradient_check")
def test_the_check_reports_the_size_of_the_gradient(tiny):
    """The last column of the first rows by hand: beta sigma(r^_l - r^_w) / B, of the pair with the
    largest weight."""
    policy, batch = tiny
    table = list(dpo.gradient_check(policy, batch, beta=0.7))
    names = ["log pi(y_w|x)", "log pi(y_l|x)", "logits", *dict(policy.named_parameters())]
    if [row[0] for row in table] != names:
        raise Mistake(f"the rows must be named {', '.join(names)}; they are named "
                      f"{', '.join(str(row[0]) for row in table)}")
    if any(len(row) != 5 for row in table):
        raise Mistake("a row has five entries: name, shape, error against autograd, error against "
                      "differences, largest entry")
    rows = {name: row for name, *row in table}
    weights = []
    pairs = pairs_by_hand(policy, batch)
    for w, _, l, _, rw, rl in pairs:
        weights.append(0.7 / (1 + math.exp(0.7 * (w - rw - l + rl))) / 3)
    largest = vector(max(weights))[0]
    def largest_with(weight):
        return vector(max(weight(w, l, rw, rl) for w, _, l, _, rw, rl in pairs))[0] * 0.7 / 3

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    for name in ("log pi(y_w|x)", "log pi(y_l|x)"):
        assert_same(rows[name][3], largest, 1e-12, {
            "beta is missing": largest / 0.7,
            "this is a sum over pairs; wanted the mean": largest * 3,
            "this is the mean over all 2B responses; wanted the mean over B pairs": largest / 2,
            "the weight is missing": vector(0.7 / 3)[0],
            "the weight's sign is flipped": largest_with(
                lambda w, l, rw, rl: sigma(0.7 * (w - rw - l + rl))),
            "the weight takes the absolute value of the margin": largest_with(
                lambda w, l, rw, rl: sigma(-0.7 * abs(w - rw - l + rl))),
            "the weight lacks beta": largest_with(lambda w, l, rw, rl: sigma(l - rl - w + rw)),
            "the reference is ignored in the weight":
                largest_with(lambda w, l, rw, rl: sigma(0.7 * (l - w))),
            "the largest entry comes last": rows[name][1],
        }, what=f"the largest entry for {name}")
    gradient = weighted_gradient(pairs, 0.7, lambda w, l: 1 / (1 + math.exp(w - l)))
    of_parameters = [row[3] for name, row in rows.items() if "log" not in name]
    assert_same(max(of_parameters), gradient.abs().max(), 1e-12,
                what="the largest entry for a parameter")


@grades("gradient_check")
def test_the_check_agrees_at_every_level(tiny):
    """Claim 9. The analytic gradient agrees with autograd (1e-9) and with differences (1e-6).

    It does so at the level of the log-probabilities, of the logits and of every parameter. The
    largest entries are far from zero.
    """
    rows = list(dpo.gradient_check(*tiny, beta=0.7))
    parameters = dict(tiny[0].named_parameters())
    wanted = {"log pi(y_w|x)": (3,), "log pi(y_l|x)": (3,), "logits": (6, 7, 9)}
    wanted |= {name: tuple(p.shape) for name, p in parameters.items()}
    assert [row[0] for row in rows] == list(wanted), (
        f"the rows must be {', '.join(wanted)}; they are {', '.join(row[0] for row in rows)}")
    for name, shape, autograd, differences, largest in rows:
        assert shape == wanted[name], f"{name}: the shape is {shape}; wanted {wanted[name]}"
        assert autograd <= 1e-9, (
            f"{name}: the analytic gradient and autograd differ by {autograd:.1e}; the largest "
            f"entry is {largest:.1e}. Is a sign wrong, is beta missing, or is it a sum over pairs?")
        assert differences <= 1e-6, (
            f"{name}: autograd agrees, but differences disagree by {differences:.1e}")
        assert largest > 1e-6, (
            f"{name}: the largest entry is {largest:.1e}, but the gradient is not zero here")


@grades("gradient_check")
def test_the_check_notices_a_gradient_that_lies(tiny):
    """A model whose backward pass is wrong.

    Autograd and the analytic form both rest on the backward pass, so they agree. Only the
    differences show that it is wrong. The check must report them as apart.
    """
    class Liar(Bare):
        def forward(self, tokens):
            logits = self.gpt(tokens)
            return 2 * logits - logits.detach()  # the value of logits, with twice the gradient

    rows = list(dpo.gradient_check(Liar(tiny[0]), tiny[1], beta=0.7))
    autograd = max(row[2] for row in rows)
    assert autograd <= 1e-9, (
        f"autograd is reported as off by {autograd:.1e}, but for this model it agrees with the "
        "analytic gradient")
    for name, _, _, differences, largest in rows[3:]:
        assert differences == pytest.approx(largest / 2, rel=1e-5, abs=1e-6), (
            f"{name}: the error against differences is reported as {differences:.2e}. But the "
            f"gradient of this model is twice too large, so the largest error is {largest / 2:.2e}")


@grades("gradient_check")
def test_the_check_notices_an_analytic_gradient_of_zeros(tiny):
    """Then the error against autograd is the largest entry of autograd's gradient. A gradient_check
    that does not call a function analytic_gradient is let off."""
    calls, held_in = [], getattr(inspect.unwrap(dpo.gradient_check), "__globals__", {})
    right = {row[0]: row[4] for row in dpo.gradient_check(*tiny, beta=0.7)}

    def zeros(policy, batch, beta):
        calls.append(1)
        return [torch.zeros_like(p) for p in policy.parameters()]

    with pytest.MonkeyPatch.context() as patch:
        if "analytic_gradient" in held_in:
            patch.setitem(held_in, "analytic_gradient", zeros)
        rows = list(dpo.gradient_check(*tiny, beta=0.7))
    for name, _, autograd, _, largest in rows[3:]:
        assert not calls or autograd == pytest.approx(right[name], rel=1e-6, abs=1e-9), (
            f"{name}: analytic_gradient gave zeros, and the error against autograd is reported as "
            f"{autograd:.1e}; wanted {right[name]:.1e}")


def flipped_weight(chosen_rewards, rejected_rewards):
    return torch.sigmoid(chosen_rewards - rejected_rewards)


def zero_gradient(policy, batch, beta):
    return [torch.zeros_like(p) for p in policy.parameters()]


@pytest.mark.parametrize("name, wrong", [("gradient_weight", flipped_weight),
                                         ("analytic_gradient", zero_gradient)])
def test_the_check_notices_a_wrong_formula(tiny, monkeypatch, name, wrong):
    """With the sign of the weight flipped, or with zeros as the gradient, the check must report a
    difference from autograd."""
    monkeypatch.setattr(dpo, name, wrong)
    assert max(row[2] for row in dpo.gradient_check(*tiny, beta=0.7)) > 1e-3


def run_main():
    """Runs dpo.main(), which works in float64 and must not leave the process so."""
    try:
        dpo.main()
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_command_prints_the_table(capsys):
    """Rows for the log-probabilities, the logits, two embeddings, two blocks of 12 tensors and the
    last LayerNorm. None is WRONG, all differences are small, and no gradient is zero."""
    run_main()
    printed = capsys.readouterr().out
    verdicts = ("  exact", "  approximate", "  WRONG")
    rows = [line for line in printed.splitlines() if line.endswith(verdicts)]
    assert len(rows) == 3 + 2 + 2 * 12 + 2
    for row in rows:
        assert not row.endswith("WRONG"), row
        largest, autograd, differences = map(float, row.split()[-4:-1])
        assert largest > 1e-6 and autograd <= 1e-9 and differences <= 1e-6, row
    weights = printed.split("weights sigma(r_l - r_w) = ")[1].splitlines()[0].split(", ")
    assert len(set(weights)) == 3, (
        "the weights of the pairs must differ, or a constant weight would pass")


@pytest.mark.parametrize("autograd, differences, largest, verdict", [
    (0.0, 1e-10, 1.0, "exact"),
    (1e-14, 1e-10, 1.0, "exact"),
    (1e-14, 1e-10, 0.01, "exact"),
    (3e-14, 1e-10, 5.0, "exact"),
    (3e-14, 1e-10, 1.0, "approximate"),
    (1e-13, 1e-10, 5.0, "approximate"),
    (1e-9, 1e-6, 1.0, "approximate"),
    (2e-9, 1e-10, 1.0, "WRONG"),
    (0.0, 2e-6, 1.0, "WRONG"),
    (math.nan, 1e-10, 1.0, "WRONG"),
    (0.0, math.nan, 1.0, "WRONG"),
])
def test_the_commands_verdicts_are_those_it_explains(monkeypatch, capsys, autograd, differences,
                                                     largest, verdict):
    """exact: within 1e-14 of the largest entry, or of 1. approximate: within 1e-9. Both are within
    1e-6 of the differences.

    Anything else is WRONG. Then the command fails, and it names this row and no other.
    """
    def two_rows(policy, batch, beta):
        yield "good", (1,), 0.0, 0.0, 1.0
        yield "row", (3,), autograd, differences, largest

    monkeypatch.setattr(dpo, "gradient_check", two_rows)
    if verdict == "WRONG":
        with pytest.raises(SystemExit, match="^the gradient is wrong for row: "):
            run_main()
    else:
        run_main()
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("row"))
    assert line.split()[-1] == verdict


def test_the_command_checks_a_batch_worth_checking(monkeypatch, capsys):
    """Three pairs of random texts, the same every time. Two answers to each prompt, of several
    lengths. One is as long as the model reads.

    The policy has left the reference: LayerNorm's weights, which are 1 at first, differ from 1 by
    0.2 (within a quarter). The printed beta is the one that is checked.
    """
    seen = []

    def record(policy, batch, beta):
        seen.append((policy, batch, beta))
        return iter(())

    monkeypatch.setattr(dpo, "gradient_check", record)
    torch.manual_seed(7)  # the command has a seed of its own
    run_main()
    printed = capsys.readouterr().out
    (policy, batch, beta), = seen
    tokens, mask, config = batch["tokens"], batch["response_mask"], policy.config
    assert f"on 3 pairs, a {config.n_layer}-layer GPT, float64, beta = {beta}." in printed
    assert beta == 0.5, "at beta = 1 a missing beta would not be seen"
    assert config == GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
    random = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(0))
    random[3:, :3] = random[:3, :3]
    assert torch.equal(tokens, random), "the texts, or both answers do not answer one prompt"
    lengths = [5, 2, 4, 3, 4, 5]
    assert mask.tolist() == [3 * [False] + n * [True] + (5 - n) * [False] for n in lengths]
    assert (tokens[:3, 3:] != tokens[3:, 3:]).any(1).all(), "the answers of a pair must differ"
    assert all(p.dtype == torch.float64 for p in policy.parameters())
    norms = [p - 1 for name, p in policy.named_parameters() if "ln" in name and "weight" in name]
    moved = torch.cat(norms).square().mean().sqrt().item()
    assert len(norms) == 5 and moved == pytest.approx(0.2, rel=0.25)
    policy_logps = torch.cat(dpo.pair_logps(policy, batch))
    ref_logps = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    assert ((policy_logps - ref_logps).abs() > 1e-3).all()
    assert (ref_logps < 0).all() and not ref_logps.requires_grad
