"""The variants: IPO (https://arxiv.org/abs/2310.12036; its equations carry a *), conservative and
robust DPO, the hinge, and PsiPO, of which both DPO and IPO are members. float64, 1e-10 unless
stated."""
import inspect
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import dpo
import losses
import world
from lab import tabular
from test_2_loss_and_gradient import (
    check_detached,
    check_rewards,
    check_slope,
    check_wide_margin,
)
from tools import (
    assert_refused,
    assert_same,
    betas,
    grades,
    numbers,
    softplus,
    vector,
    worlds,
)

# name in losses.LOSSES -> name of the function
FUNCTIONS = {"sigmoid": "dpo_loss", "cdpo": "cdpo_loss", "robust": "robust_loss",
             "ipo": "ipo_loss", "hinge": "hinge_loss"}
SMOOTHED = ("cdpo", "robust")  # these take label_smoothing


def loss_named(name):
    """The loss function as it stands in its module now: the grader exchanges it there."""
    return dpo.dpo_loss if name == "sigmoid" else getattr(losses, FUNCTIONS[name])


def for_each(names, **kind):
    """Parametrises a test by the names of losses. Each case is a proof that grades its function."""
    cases = [pytest.param(name, marks=grades(FUNCTIONS[name], **kind)) for name in names]
    return pytest.mark.parametrize("name", cases)


def losses_at(name, h, beta, **options):
    """The losses of pairs whose preference logits are h. The policy's chosen log-probabilities are
    h, and all others are 0."""
    h = torch.as_tensor(h, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(h)
    return loss_named(name)(h, zero, zero, zero, beta=beta, **options)[0]


def formula(name, h, beta, eps=0.1):
    """The losses as the papers write them, h (B,)."""
    if name == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return (1 - beta * h).clamp(min=0)
    right, flipped = softplus(-beta * h), softplus(beta * h)
    if name == "robust":
        return ((1 - eps) * right - eps * flipped) / (1 - 2 * eps)
    if name == "cdpo":
        return (1 - eps) * right + eps * flipped
    return right


def smoothing(name, eps):
    """label_smoothing as a keyword argument, for a loss that takes it."""
    return {"label_smoothing": eps} if name in SMOOTHED else {}


# ---- The losses and their names

def variant_mistakes(name, h, beta, eps):
    """What is often written instead of a variant, and the value that it gives, h (B,)."""
    right, flipped = softplus(-beta * h), softplus(beta * h)  # -log sigma(beta h), and of -beta h
    want = formula(name, h, beta, eps)
    every = {
        "beta is hard-coded as 0.1": formula(name, h, 0.1, eps),
        "this takes the absolute value of h": formula(name, h.abs(), beta, eps),
        "this is the mean; wanted the loss of each pair, (B,)": want.mean(),
        "this is the sum; wanted the loss of each pair, (B,)": want.sum(),
        "each loss is divided by the number of pairs; the caller takes the mean": want / len(h),
        "the absolute value of the loss is taken": want.abs(),
    }
    if name == "ipo":
        return every | {
            "the target is 1/(2 tau), not 1/tau": (h - 1 / beta) ** 2,
            "the target is 1/(2 tau). You have tau/2 or 2 tau: divide by both":
                [(h - beta / 2) ** 2, (h - 2 * beta) ** 2],
            "the target is 1/(2 tau). You have tau": (h - beta) ** 2,
            "the target is 1/(2 tau). Yours has no tau": [(h - 0.5) ** 2, (h - 1) ** 2],
            "h is multiplied by beta. IPO has no beta there: (h - 1/(2 tau))^2":
                [(beta * h - 1 / (2 * beta)) ** 2, (beta * h - 1 / 2) ** 2],
            "the target 1/(2 tau) is missing": h ** 2,
            "this is the absolute value. IPO squares": (h - 1 / (2 * beta)).abs(),
            "the square is missing": h - 1 / (2 * beta),
            "brackets are missing: only h is squared": h ** 2 - 1 / (2 * beta),
            "the target is 1/(2 tau), not 1/(2 tau^2)": (h - 1 / (2 * beta ** 2)) ** 2,
            "the target is added; IPO subtracts it, or chosen and rejected are swapped":
                (h + 1 / (2 * beta)) ** 2,
            "the square is halved": want / 2,
            "the square is multiplied by beta": [beta * want, beta ** 2 * want],
        }
    if name == "hinge":
        return every | {
            "beta is missing in the hinge": (1 - h).clamp(min=0),
            "beta stands outside. The hinge is max(0, 1 - beta h)": beta * (1 - h).clamp(min=0),
            "h is divided by beta. The hinge is max(0, 1 - beta h)": (1 - h / beta).clamp(min=0),
            "beta is there twice": (1 - beta ** 2 * h).clamp(min=0),
            "the hinge is divided by beta. It is max(0, 1 - beta h)": (1 / beta - h).clamp(min=0),
            "the hinge is mirrored: it must be large where the pair is ranked wrongly":
                (beta * h - 1).clamp(min=0),
            "the margin is beta here. The hinge is max(0, 1 - beta h)": (beta - h).clamp(min=0),
            "the hinge is not cut off at 0": 1 - beta * h,
            "the 1 is missing. The hinge is max(0, 1 - beta h)": (-beta * h).clamp(min=0),
            "the hinge is squared": want ** 2,
            "this is the absolute value; the hinge is 0 from 1/beta on": (1 - beta * h).abs(),
            "this is a soft hinge, which never stops": softplus(1 - beta * h),
            "the hinge is cut off on the wrong side: max, not min": (1 - beta * h).clamp(max=0),
            "the sign of h is flipped, or chosen and rejected are swapped":
                (1 + beta * h).clamp(min=0),
        }
    every |= {
        "beta is missing": formula(name, h / beta, beta, eps),
        "beta is there twice": formula(name, beta * h, beta, eps),
        "beta stands outside sigma": beta * formula(name, h / beta, beta, eps),
        "the sign of the loss is flipped. log sigma is negative": -want,
        "label_smoothing is hard-coded as 0.1": formula(name, h, beta, 0.1),
        "label_smoothing is halved": formula(name, h, beta, eps / 2),
        "the sign of label_smoothing is wrong": formula(name, h, beta, -eps),
    }
    if name == "sigmoid":
        return every
    every["this is the DPO loss. Is label_smoothing ignored, or the flipped term not flipped?"] = (
        right)
    if name == "cdpo":
        return every | {
            "the flipped term is subtracted; cDPO adds it": (1 - eps) * right - eps * flipped,
            "this is robust DPO. cDPO adds eps times the flipped loss and does not divide":
                formula("robust", h, beta, eps),
            "eps and 1 - eps are swapped, or chosen and rejected":
                eps * right + (1 - eps) * flipped,
            "the flipped term is missing": (1 - eps) * right,
            "beta is missing in the flipped term": (1 - eps) * right + eps * softplus(h),
            "the factor 1 - eps is missing": right + eps * flipped,
            "the factor eps is missing": (1 - eps) * right + flipped,
        }
    return every | {
        "the factor 1/(1 - 2 eps) is missing": want * (1 - 2 * eps),
        "the loss is multiplied by 1 - 2 eps; divide by it": want * (1 - 2 * eps) ** 2,
        "the loss is divided by 1 + 2 eps; wanted 1 - 2 eps":
            want * (1 - 2 * eps) / (1 + 2 * eps),
        "brackets are missing: only the flipped term is divided by 1 - 2 eps":
            (1 - eps) * right - eps * flipped / (1 - 2 * eps),
        "the factor 1 - eps is missing": (right - eps * flipped) / (1 - 2 * eps),
        "beta is missing in the flipped term":
            ((1 - eps) * right - eps * softplus(h)) / (1 - 2 * eps),
        "the flipped term is missing": (1 - eps) * right / (1 - 2 * eps),
        "negative losses are cut off at 0. Then the loss is not unbiased": want.clamp(min=0),
        "the loss is divided by 1 - eps; wanted 1 - 2 eps": want * (1 - 2 * eps) / (1 - eps),
        "this is cDPO. Robust DPO subtracts eps times the flipped loss and divides by 1 - 2 eps":
            formula("cdpo", h, beta, eps),
        "the flipped term is added; robust DPO subtracts it":
            formula("cdpo", h, beta, eps) / (1 - 2 * eps),
        "eps and 1 - eps are swapped":
            [(eps * right - (1 - eps) * flipped) / (1 - 2 * eps),
             eps * right - (1 - eps) * flipped],
        "chosen and rejected are swapped, or the sign of h is flipped":
            ((1 - eps) * flipped - eps * right) / (1 - 2 * eps),
    }


@for_each(FUNCTIONS)
@pytest.mark.parametrize("beta, eps", [(0.3, 0.24), (1.7, 0.35)])
def test_every_variant_on_some_pairs(name, beta, eps):
    """50 random pairs, compared with the formula of the paper, to 1e-12."""
    w, l, rw, rl = 2 * torch.randn(4, 50, dtype=torch.float64)
    got = loss_named(name)(w, l, rw, rl, beta=beta, **smoothing(name, eps))[0]
    h = (w - l) - (rw - rl)
    assert_same(got, formula(name, h, beta, eps), 1e-12, {
        "the reference is ignored": formula(name, w - l, beta, eps),
        "the reference's log-ratio has the wrong sign":
            formula(name, (w - l) + (rw - rl), beta, eps),
    } | variant_mistakes(name, h, beta, eps), what=f"the {name} loss")


@for_each(FUNCTIONS)
@given(numbers(3, 40), st.floats(-2, 1).map(lambda e: 10 ** e), st.floats(0, 0.45))
def test_every_variant_is_its_papers_formula(name, h, beta, eps):
    """For every h, every beta and every share eps of flipped labels."""
    title = f"the {name} loss at beta = {beta:g}"
    if name in SMOOTHED:
        title += f", label_smoothing = {eps:g}"
    assert_same(losses_at(name, h, beta, **smoothing(name, eps)), formula(name, h, beta, eps),
                1e-10, what=title)


@for_each(FUNCTIONS)
def test_the_variants_differ_and_share_their_rewards(name):
    """A loss that is secretly another one shows here. The rewards are beta log(pi/ref) for every
    loss."""
    w, l, rw, rl = logps = list(5 * torch.randn(4, 20, dtype=torch.float64))
    got, chosen, rejected = loss_named(name)(*logps, beta=0.3)
    for other in FUNCTIONS:
        if other != name:
            difference = (got - formula(other, (w - l) - (rw - rl), 0.3)).abs().max()
            assert difference > 1e-3, f"{FUNCTIONS[name]} gives the losses of {FUNCTIONS[other]}"
    check_rewards(chosen, rejected, logps, 0.3)


@for_each(FUNCTIONS)
def test_every_variant_trains_the_policy_and_not_through_the_rewards(name):
    """The gradient of each loss at both log-probabilities is dL/dh, by hand, and its opposite
    (1e-12). The rewards carry none: they are for looking at."""
    w, l, rw, rl = torch.randn(4, 5, dtype=torch.float64)
    beta, eps, h = 0.3, 0.1, (w - l) - (rw - rl)
    right, flipped = -beta * torch.sigmoid(-beta * h), beta * torch.sigmoid(beta * h)
    slope = {"sigmoid": right, "cdpo": (1 - eps) * right + eps * flipped,
             "robust": ((1 - eps) * right - eps * flipped) / (1 - 2 * eps),
             "ipo": 2 * (h - 1 / (2 * beta)), "hinge": -beta * (beta * h < 1).double()}[name]
    w, l = w.requires_grad_(), l.requires_grad_()
    got = loss_named(name)(w, l, rw, rl, beta=beta)[0]
    check_slope(got, w, l, slope, what=f"the {name} loss")
    check_detached(lambda *logps: loss_named(name)(*logps, beta=beta)[1:])


def test_every_loss_stands_under_its_name():
    """losses.LOSSES is how a name, such as that of --loss ipo, becomes a function. Each name stands
    for the function of that name. Names that mean nothing are not there."""
    for name, function in FUNCTIONS.items():
        assert losses.LOSSES[name] is getattr(losses, function), f"LOSSES[{name!r}] is another loss"
    assert losses.LOSSES["sigmoid"] is dpo.dpo_loss
    for name in losses.LOSSES.keys() - {"sigmoid"}:
        function = losses.LOSSES[name].__name__
        assert function == f"{name}_loss", f"LOSSES[{name!r}] is {function}"
    for unknown in ("tanh", "", "dpo", "SIGMOID"):
        assert unknown not in losses.LOSSES, f"LOSSES[{unknown!r}] has no meaning"


def test_the_losses_of_all_names_differ_and_share_their_rewards():
    """The same four log-probabilities through every entry of LOSSES: no two entries give the same
    losses, and all give the rewards of dpo_loss."""
    four = torch.randn(4, 20, dtype=torch.float64)
    _, chosen, rejected = dpo.dpo_loss(*four, beta=0.3)
    results = {}
    for name, loss in losses.LOSSES.items():
        results[name], *rewards = loss(*four, beta=0.3)  # the rewards are two: chosen, rejected
        assert results[name].shape == (20,), f"{name} must return the loss of each pair, (B,)"
        assert torch.equal(rewards[0], chosen), f"{name} has other chosen rewards than DPO"
        assert torch.equal(rewards[1], rejected), f"{name} has other rejected rewards than DPO"
    names = list(results)
    for i, name in enumerate(names):
        for other in names[:i]:
            difference = (results[name] - results[other]).abs().max()
            assert difference > 1e-3, f"{name} and {other} give the same losses"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_name_read_from_a_file_will_do(name):
    """Names are compared by value. A name that is put together at run time is another object with
    the same letters."""
    read = "".join(list(name))
    zero = torch.zeros(1, dtype=torch.float64)
    got = losses.LOSSES[read](vector(2.0), zero, zero, zero, beta=0.3)[0]
    assert_same(got, formula(name, vector(2.0), 0.3), 1e-12, what=f"the {name} loss")


def test_label_smoothing_is_taken_where_it_has_a_meaning():
    """losses.SMOOTHED names the losses with an argument label_smoothing, and no others."""
    takes = []
    for name, loss in losses.LOSSES.items():
        if "label_smoothing" in inspect.signature(loss).parameters:
            takes.append(name)
    assert set(takes) == set(losses.SMOOTHED) and set(SMOOTHED) <= set(takes)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in SMOOTHED])
def test_label_smoothing_is_refused_where_it_means_nothing(name):
    """These losses have no formula with flipped labels. An option that is accepted and ignored
    would be worse than an error."""
    losses_at(name, 1.0, 0.3)  # without the option it is a loss
    with pytest.raises(TypeError, match="label_smoothing"):
        losses_at(name, 1.0, 0.3, label_smoothing=0.1)


def assert_smoothing_refused(name, eps):
    zeros = torch.zeros(4, 1, dtype=torch.float64)
    return assert_refused(loss_named(name), *zeros, beta=0.3, label_smoothing=eps)


@for_each(SMOOTHED, guard="label_smoothing outside [0, 0.5)")
@pytest.mark.parametrize("eps", [0.5, -0.1, 0.7, math.nan])
def test_label_smoothing_outside_its_range_is_refused(name, eps):
    """It is the share of flipped labels, in [0, 0.5). At one half the labels say nothing. A
    ValueError is raised."""
    assert_smoothing_refused(name, eps)


@pytest.mark.parametrize("name", SMOOTHED)
@pytest.mark.parametrize("eps", [0.5, -0.1, 0.7, math.nan])
def test_the_refusal_of_label_smoothing_names_the_value(name, eps):
    """The message of the project's own ValueError."""
    assert f"label_smoothing={eps}" in assert_smoothing_refused(name, eps)


@for_each(FUNCTIONS)
def test_without_options_beta_and_label_smoothing_are_one_tenth(name):
    """beta = 0.1 for every loss. label_smoothing = 0.1 for those that take it."""
    h = torch.randn(20, dtype=torch.float64)
    zero = torch.zeros_like(h)
    got = loss_named(name)(h, zero, zero, zero)[0]
    others = [formula(name, h, beta, 0.1) for beta in (1, 0.5, 0.05, 0.01, 0.2)]
    assert_same(got, formula(name, h, 0.1, 0.1), 1e-12, {
        "without options, beta is 0.1. Yours has another default": others,
    }, what=f"the {name} loss without options")


@for_each(["cdpo", "robust", "hinge"])
def test_the_variants_of_a_pair_that_is_ranked_wrongly_by_far(name):
    """beta h = -1000 in float32, eps = 1/4: the loss is finite, and right to 1e-6."""
    def loss(*logps, beta):
        return loss_named(name)(*logps, beta=beta, **smoothing(name, 0.25))

    check_wide_margin(loss, lambda h: formula(name, h, 0.5, 0.25))


@for_each(["cdpo", "robust", "hinge"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6),
                                              (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@given(h=st.floats(-1e4, 1e4, width=16), beta=st.sampled_from([0.25, 1.0, 2.0]))
def test_the_variants_are_finite_and_right_at_extreme_margins(name, dtype, tolerance, h, beta):
    """Margins up to +-1e4 in every precision, as for dpo_loss: log(sigmoid(x)) underflows to -inf.
    logsigmoid does not."""
    x = torch.tensor([h], dtype=dtype, requires_grad=True)
    zero = torch.zeros(1, dtype=dtype)
    got = loss_named(name)(x, zero, zero, zero, beta=beta, **smoothing(name, 0.25))[0]
    want = formula(name, x.detach().double(), beta, 0.25)
    assert_same(got.detach().double(), want, tolerance, what=f"the {name} loss at h = {h:g}")
    slope = torch.autograd.grad(got.sum(), x)[0]
    assert slope.isfinite().all(), f"the slope at h = {h:g} is {slope.item()}"


# ---- IPO

@grades("ipo_loss")
@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_reaches_its_margin_and_stops(tau):
    """Claim 25 (Eq. 17*). Gradient flow on the logits of one pair.

    The flow, by Runge-Kutta, is compared with h(t) = (1 - e^(-4t))/(2 tau), to 1e-8. The margin
    stays finite. The smaller tau is, the larger it is.
    """
    ref = torch.log_softmax(torch.randn(3, dtype=torch.float64), -1)

    def loss(theta):
        logps = torch.log_softmax(theta, -1)
        return losses.ipo_loss(logps[:1], logps[1:2], ref[:1], ref[1:2], beta=tau)[0].sum()

    for time, steps in ((0.2, 50), (8.0, 100)):
        theta = tabular.gradient_flow(loss, ref, time, steps=steps)
        h = (theta[0] - theta[1]) - (ref[0] - ref[1])
        want = vector((1 - math.exp(-4 * time)) / (2 * tau))[0]
        assert_same(h, want, 1e-8, what=f"h at time {time}")


@grades("ipo_loss")
def test_ipo_on_a_chain_of_sure_labels():
    """Claim 26 (its example D1). The labels always say a over b, b over c, and a over c.

    IPO stops at the gaps 1/(3 tau), 1/(3 tau) and 2/(3 tau): what LBFGS finds is compared with
    them, to 1e-8. DPO on the same pairs never stops: its gap grows by more than 1 from each time to
    ten times this time.
    """
    tau, ref = 0.25, torch.full((3,), 1 / 3, dtype=torch.float64).log()
    preference = vector(0, 1, 1, 0, 0, 1, 0, 0, 0).view(3, 3)
    drawn = torch.ones(3, 3, dtype=torch.float64).fill_diagonal_(0) / 6

    def ipo(theta):
        logps = torch.log_softmax(theta, -1)
        return tabular.population_loss(logps, ref, preference, tau, drawn, loss=losses.ipo_loss)

    def dpo_(theta):
        logps = torch.log_softmax(theta, -1)
        return tabular.population_loss(logps, ref, preference, tau, drawn, loss=dpo.dpo_loss)

    theta = tabular.minimise(ipo, ref)
    assert_same(theta[:2] - theta[1:], vector(1, 1) / (3 * tau), 1e-8,
                what="IPO's gaps a-b and b-c")
    assert_same(theta[0] - theta[2], vector(2)[0] / (3 * tau), 1e-8, what="IPO's gap a-c")
    gaps = []
    for time in (10.0, 100.0, 1000.0):
        theta = tabular.gradient_flow(dpo_, ref, time, steps=100)
        gaps.append((theta[0] - theta[1]).item())
    assert gaps[1] - gaps[0] > 1 and gaps[2] - gaps[1] > 1, (
        f"on sure labels DPO's gap must grow without end; at times 10, 100, 1000 it is {gaps}")


@grades("ipo_loss")
@given(numbers(1, 30), st.floats(-2, 1).map(lambda e: 10 ** e))
def test_ipos_sampled_and_centred_losses_have_one_gradient(h, tau):
    """Claim 27, first half (Eq. 16* and 17*). The data contain both orders of a pair.

    One order has the loss (h - 1/tau)^2, the other (-h - 0)^2. Their mean differs from
    (h - 1/(2 tau))^2 by a constant. So both have the same slope. The slope of the code's loss is
    compared with that of the mean, both by autograd, to 1e-10.
    """
    x = h.clone().requires_grad_()
    sampled = torch.autograd.grad((((x - 1 / tau) ** 2 + (-x) ** 2) / 2).sum(), x)[0]
    y, zero = h.clone().requires_grad_(), torch.zeros_like(h)
    loss = losses.ipo_loss(y, zero, zero, zero, beta=tau)[0].sum()
    centred = torch.autograd.grad(loss, y)[0]
    assert_same(centred, sampled, 1e-10, what="the slope")


@grades("ipo_loss")
@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_ipos_minimiser(tau):
    """Claim 27, second half. With pairs of ref x ref IPO ends at ref exp(p(y over ref)/tau)/Z.

    It fits probabilities of preferences, where DPO fits rewards. So its optimum is not DPO's pi*.
    What LBFGS finds is compared with plain sums, to a total variation of 1e-8.
    """
    ref, reward = tabular.random_world(5)
    preference = tabular.preferences(reward)

    def loss(theta):
        logps = torch.log_softmax(theta, -1)
        return tabular.population_loss(logps, ref, preference, tau, loss=losses.ipo_loss)

    found = torch.log_softmax(tabular.minimise(loss, ref), -1)
    p = []  # p(y over ref) of each response y
    for i in range(5):
        p.append(sum(preference[i, j].item() * ref[j].exp().item() for j in range(5)))
    want = torch.softmax(ref + vector(*p) / tau, -1).log()
    distance = tabular.total_variation(found, want)
    assert distance < 1e-8, f"the minimiser is {distance:.2g} in total variation from IPO's optimum"
    assert_same(tabular.psi_policy(ref, preference, ref, lambda q: q, tau), want, 1e-12,
                what="PsiPO's optimum for the identity")
    star = world.optimal_policy(ref, reward, tau)
    assert tabular.total_variation(found, star) > 1e-3, "IPO must not end at DPO's pi*"


@given(worlds(policies=1), betas)
def test_psi_po_with_the_logit_is_rlhf(drawn, tau):
    """Claim 30 (Proposition 1*). psi = logit, with Bradley-Terry preferences.

    E[logit p(y over y')] = r(y) - E[r(y')]. So PsiPO's optimum is pi*, and it does not matter which
    policy y' is sampled from. Both are compared, to 1e-8 (the optimum to 1e-8/tau for tau < 1).
    """
    ref, reward, sampler = drawn

    def logit(p):
        return torch.log(p) - torch.log1p(-p)

    # beyond this spread, 1 - p has lost too many digits for its logit
    assume((reward.max() - reward.min()).item() < 15)
    worth = (logit(tabular.preferences(reward)) * sampler.exp()).sum(-1)
    assert_same(worth, reward - world.expected(sampler, reward), 1e-8, what="E[logit p]")
    found = tabular.psi_policy(ref, tabular.preferences(reward), sampler, logit, tau)
    assert_same(found.exp(), world.optimal_policy(ref, reward, tau).exp(), 1e-8 * max(1, 1 / tau),
                what="PsiPO's optimum for the logit")


# ---- Noisy labels, and the hinge

@grades("cdpo_loss")
@given(st.floats(0.01, 0.49), st.floats(-1, 1).map(lambda e: 10 ** e))
def test_conservative_dpo_stops_at_the_noises_log_odds(eps, beta):
    """Claim 28. The slope of cDPO is zero at beta h = log((1 - eps)/eps). It trusts no label
    further than that.

    The slope there, by autograd, is compared with 0, to 1e-12. It is negative before and positive
    after.
    """
    stop = math.log((1 - eps) / eps) / beta
    h = vector(stop, 0.8 * stop - 0.1, 1.2 * stop + 0.1).requires_grad_()
    at_h = losses_at("cdpo", h, beta, label_smoothing=eps)
    slope = torch.autograd.grad(at_h.sum(), h)[0]
    assert_same(slope[0], vector(0.0)[0], 1e-12, what="the slope at the stop")
    assert slope[1] < 0 < slope[2], "the stop must be the minimum"


@grades("robust_loss")
@given(numbers(4, 30), st.floats(0, 0.49), betas)
def test_robust_dpo_is_unbiased_under_flipped_labels(h, eps, beta):
    """Claim 29. Each label is flipped with probability eps. Then the mean of robust DPO,
    (1 - eps) L(h) + eps L(-h), is the DPO loss on clean labels. The mean of cDPO is not.

    The mean is compared with log(1 + e^(-beta h)), to 1e-10/(1 - 2 eps).
    """
    clean = softplus(-beta * h)
    mean = ((1 - eps) * losses_at("robust", h, beta, label_smoothing=eps)
            + eps * losses_at("robust", -h, beta, label_smoothing=eps))
    mean_of_cdpo = ((1 - eps) * formula("cdpo", h, beta, eps)
                    + eps * formula("cdpo", -h, beta, eps))
    assert_same(mean, clean, 1e-10 / (1 - 2 * eps),
                what="the mean of robust DPO over flipped labels")
    if eps > 0.05 and (beta * h).abs().max() > 0.1:
        assert (mean_of_cdpo - clean).abs().max() > 1e-6, "here cDPO would be unbiased too"


@grades("cdpo_loss")
def test_conservative_dpo_is_biased_under_flipped_labels():
    """Claim 29, the other half. The mean of cDPO over flipped labels is not the DPO loss on clean
    labels. At beta h = 0 they are equal, and for h > 0 the mean of cDPO is larger.

    The bias is compared with 2 eps (1 - eps) beta h, to 1e-12.
    """
    h, eps, beta = vector(0, 1, 3, 6), 0.2, 0.5
    mean = ((1 - eps) * losses_at("cdpo", h, beta, label_smoothing=eps)
            + eps * losses_at("cdpo", -h, beta, label_smoothing=eps))
    bias = mean - softplus(-beta * h)
    # with L(-h) = L(h) + beta h: the flipped share is 2 eps (1 - eps), and each flip costs beta h
    assert_same(bias, 2 * eps * (1 - eps) * beta * h, 1e-12, what="the bias")


@grades("hinge_loss")
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_hinge_stops_at_the_margin_one_over_beta(beta):
    """Its slope is -beta up to h = 1/beta, and 0 from there on."""
    h = vector(-3, 0, 0.99 / beta, 1.01 / beta, 10 / beta).requires_grad_()
    slope = torch.autograd.grad(losses_at("hinge", h, beta).sum(), h)[0]
    assert_same(slope, vector(-beta, -beta, -beta, 0, 0), 1e-12, what="the slope of the hinge")


# ---- Numbers that were computed elsewhere. The tolerance is half a unit of their last digit.

@grades("dpo_loss")
def test_oracle_three_pairs():
    """beta h = [0, 1, 2]: the losses and the rewards of three pairs."""
    w, l = vector(-.5, -10, -1), vector(-.1, -30, -21)
    rw, rl = vector(-.5, -10.1, -.1), vector(-.1, -20.1, -.1)
    got, chosen, rejected = dpo.dpo_loss(w, l, rw, rl, beta=0.1)
    assert_same(got, vector(.693147, .313262, .126928), 5e-7, what="the losses")
    assert_same(chosen, vector(0, .01, -.09), 1e-12, what="the chosen rewards")
    assert_same(rejected, vector(0, -.99, -2.09), 1e-12, what="the rejected rewards")


@grades("hinge_loss")
def test_oracle_three_pairs_hinge():
    """beta h = [0, 1, 2]: the hinge losses of the same three pairs."""
    w, l = vector(-.5, -10, -1), vector(-.1, -30, -21)
    rw, rl = vector(-.5, -10.1, -.1), vector(-.1, -20.1, -.1)
    assert_same(losses.hinge_loss(w, l, rw, rl, beta=0.1)[0], vector(1, 0, 0), 1e-12,
                what="the hinge losses")


@pytest.mark.parametrize("name, loss, slope", [
    pytest.param("sigmoid", .437488, -.035434, marks=grades("dpo_loss")),
    pytest.param("hinge", .4, -.1, marks=grades("hinge_loss")),
    pytest.param("ipo", 1.0, 2.0, marks=grades("ipo_loss")),
])
def test_oracle_one_pair_loss_and_slope(name, loss, slope):
    """One pair with beta = 0.1 and h = 6: its loss and dL/dh."""
    h = vector(6.0).requires_grad_()
    got = losses_at(name, h, 0.1)
    assert_same(got.detach(), vector(loss), 5e-7, what="the loss")
    assert_same(torch.autograd.grad(got.sum(), h)[0], vector(slope), 5e-7, what="dL/dh")


@grades("dpo_loss")
def test_oracle_mean_of_two():
    """The mean loss of two pairs, with beta = 0.1."""
    w, l, rw, rl = vector(0, -1), vector(-1, 0), vector(-2, -1), vector(-1, -2)
    got = dpo.dpo_loss(w, l, rw, rl, beta=0.1)[0]
    assert_same(got.mean(), vector(.698139)[0], 5e-7, what="the mean loss")


@pytest.mark.parametrize("name, loss", [
    pytest.param("cdpo", .413262, marks=grades("cdpo_loss")),
    pytest.param("robust", .188262, marks=grades("robust_loss")),
])
def test_oracle_label_smoothing(name, loss):
    """beta h = 1, eps = 0.1: cDPO .413262, robust DPO .188262."""
    got = losses_at(name, 1.0, 1.0, label_smoothing=0.1)
    assert_same(got, vector(loss), 5e-7, what=f"the {name} loss")
