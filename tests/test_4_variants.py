"""The variants: IPO (https://arxiv.org/abs/2310.12036; its equations carry a *), conservative and robust DPO, the
hinge, and the family that has DPO and IPO as members. float64, 1e-10 unless stated."""
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import dpo
import tabular
import world
from tools import betas, grades, numbers, assert_same, softplus, vector, worlds


def losses_at(h, beta, **kind):
    """The losses of pairs whose preference logits are h, put there by the policy's chosen log-probs."""
    h = torch.as_tensor(h, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(h)
    return dpo.dpo_loss(h, zero, zero, zero, beta=beta, **kind)[0]


def formula(loss_type, h, beta, eps):
    """The four papers' losses, h (B,)."""
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return (1 - beta * h).clamp(min=0)
    sign, scale = (1, 1) if loss_type == "sigmoid" else (-1, 1 / (1 - 2 * eps))
    return scale * ((1 - eps) * softplus(-beta * h) + sign * eps * softplus(beta * h))


@grades("dpo_loss")
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "ipo", "hinge"])
@given(numbers(3, 40), st.floats(-2, 1).map(lambda e: 10 ** e), st.floats(0, 0.45))
def test_every_variant_is_its_papers_formula(loss_type, h, beta, eps):
    """For every h, beta and share eps of flipped labels."""
    eps = eps if loss_type in ("sigmoid", "robust") else 0.0
    want = formula(loss_type, h, beta, eps)
    assert_same(losses_at(h, beta, loss_type=loss_type, label_smoothing=eps), want, 1e-10, {
        "loss_type is ignored: this is the sigmoid loss": formula("sigmoid", h, beta, eps),
        "label_smoothing is ignored": formula(loss_type, h, beta, 0.0),
        "the factor 1/(1 - 2 eps) is missing": want * (1 - 2 * eps),
        "this is cDPO; robust DPO subtracts eps times the flipped loss and divides by 1 - 2 eps": formula("sigmoid", h, beta, eps),
        "eps and 1 - eps are swapped": (eps * softplus(-beta * h) + (1 - eps) * softplus(beta * h)),
        "the target is 1/(2 tau), not 1/tau": (h - 1 / beta) ** 2,
        "IPO has no sigmoid and no beta before h: (h - 1/(2 tau))^2": (beta * h - 1 / (2 * beta)) ** 2,
        "IPO squares; this is the absolute value": (h - 1 / (2 * beta)).abs(),
        "the hinge lacks beta": (1 - h).clamp(min=0),
        "the hinge is not cut off at 0": 1 - beta * h,
    }, what=f"the {loss_type} loss at label_smoothing {eps:g}")


@grades("dpo_loss")
def test_the_variants_differ_and_share_their_rewards():
    """A configured loss that is silently another one shows here; rewards are beta log(pi/ref) whichever loss is used."""
    four = torch.randn(4, 20, dtype=torch.float64)
    kinds = [dict(loss_type="sigmoid"), dict(loss_type="sigmoid", label_smoothing=0.1), dict(loss_type="robust", label_smoothing=0.1),
             dict(loss_type="ipo"), dict(loss_type="hinge")]
    results = [dpo.dpo_loss(*four, beta=0.3, **kind) for kind in kinds]
    for i, a in enumerate(results):
        for j in range(i):
            assert (a[0] - results[j][0]).abs().max() > 1e-3, f"{kinds[i]} and {kinds[j]} give the same loss"
        assert_same(a[1], 0.3 * (four[0] - four[2]), 1e-12, what=f"the chosen reward of {kinds[i]}")
        assert_same(a[2], 0.3 * (four[1] - four[3]), 1e-12, what=f"the rejected reward of {kinds[i]}")


@grades("dpo_loss")
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "ipo", "hinge"])
def test_a_loss_type_read_from_a_file_will_do(loss_type):
    """Names are compared by value: one put together at run time is another object with the same letters."""
    read = "".join(list(loss_type))
    assert_same(losses_at(2.0, 0.3, loss_type=read), formula(loss_type, vector(2.0), 0.3, 0.0), 1e-12, what=f"the {loss_type} loss")


# ---- IPO

@grades("dpo_loss")
@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_reaches_its_margin_and_stops(tau):
    """Claim 25 (Eq. 17*). One pair, gradient flow on its logits: h(t) = (1 - e^(-4t))/(2 tau), to 1e-8: a finite margin,
    the larger the smaller tau."""
    ref = torch.log_softmax(torch.randn(3, dtype=torch.float64), -1)

    def loss(theta):
        logps = torch.log_softmax(theta, -1)
        return dpo.dpo_loss(logps[:1], logps[1:2], ref[:1], ref[1:2], beta=tau, loss_type="ipo")[0].sum()
    for time in (0.2, 8.0):
        theta = tabular.gradient_flow(loss, ref, time, steps=1000)
        assert_same((theta[0] - theta[1]) - (ref[0] - ref[1]), vector((1 - math.exp(-4 * time)) / (2 * tau))[0], 1e-8, {
            "it runs to 1/tau, twice too far": vector((1 - math.exp(-4 * time)) / tau)[0]}, what=f"h at time {time}")


@grades("dpo_loss")
def test_ipo_on_a_chain_of_sure_labels():
    """Claim 26 (its example D1). a over b, b over c, a over c, always: IPO stops at the gaps 1/(3 tau), 1/(3 tau), 2/(3 tau);
    DPO on the same pairs runs away."""
    tau, ref = 0.25, torch.full((3,), 1 / 3, dtype=torch.float64).log()
    preference = vector(0, 1, 1, 0, 0, 1, 0, 0, 0).view(3, 3)
    drawn = torch.ones(3, 3, dtype=torch.float64).fill_diagonal_(0) / 6
    loss = lambda kind: lambda theta: tabular.population_loss(torch.log_softmax(theta, -1), ref, preference, tau, drawn, loss_type=kind)
    theta = tabular.minimise(loss("ipo"), ref)
    assert_same(theta[:2] - theta[1:], vector(1, 1) / (3 * tau), 1e-8, what="IPO's gaps a-b and b-c")
    assert_same(theta[0] - theta[2], vector(2)[0] / (3 * tau), 1e-8, what="IPO's gap a-c")
    gaps = [(lambda t: (t[0] - t[1]).item())(tabular.gradient_flow(loss("sigmoid"), ref, time)) for time in (10.0, 100.0, 1000.0)]
    assert gaps[1] - gaps[0] > 1 and gaps[2] - gaps[1] > 1, f"DPO's gap must go on growing on sure labels, got {gaps}"


@given(numbers(1, 30), st.floats(-2, 1).map(lambda e: 10 ** e))
def test_ipos_sampled_and_centred_losses_have_one_gradient(h, tau):
    """Claim 27, first half (Eq. 16* and 17*). With both orders of a pair in the data, (h - 1/tau)^2 for one and (-h - 0)^2
    for the other, their mean and (h - 1/(2 tau))^2 differ by a constant: the same slope."""
    x = h.clone().requires_grad_()
    sampled = torch.autograd.grad((((x - 1 / tau) ** 2 + (-x) ** 2) / 2).sum(), x)[0]
    y = h.clone().requires_grad_()
    centred = torch.autograd.grad(dpo.dpo_loss(y, 0 * h, 0 * h, 0 * h, beta=tau, loss_type="ipo")[0].sum(), y)[0]
    assert_same(sampled, centred, 1e-10, what="the slope")


@grades("dpo_loss")
@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_ipos_minimiser(tau):
    """Claim 27, second half. With pairs of ref x ref IPO ends at ref exp(p(y over ref)/tau)/Z: it
    fits preference probabilities where DPO fits rewards, so its optimum is not DPO's pi*. Total variation 1e-8."""
    ref, reward = tabular.random_world(5)
    preference = tabular.preferences(reward)
    loss = lambda theta: tabular.population_loss(torch.log_softmax(theta, -1), ref, preference, tau, loss_type="ipo")
    found = torch.log_softmax(tabular.minimise(loss, ref), -1)
    p = [sum(preference[i, j].item() * ref[j].exp().item() for j in range(5)) for i in range(5)]
    want = torch.softmax(ref + vector(*p) / tau, -1).log()
    assert tabular.total_variation(found, want) < 1e-8
    assert_same(tabular.psi_policy(ref, preference, ref, lambda q: q, tau), want, 1e-12, what="PsiPO's optimum for the identity")
    assert tabular.total_variation(found, world.optimal_policy(ref, reward, tau)) > 1e-3


@given(worlds(policies=1), betas)
def test_psi_po_with_the_logit_is_rlhf(drawn, tau):
    """Claim 30 (Proposition 1*). With psi = logit under Bradley-Terry, E[logit p(y over y')] = r(y) - E[r(y')]: PsiPO's
    optimum is pi*, whoever y' is sampled from."""
    ref, reward, sampler = drawn
    logit = lambda p: torch.log(p) - torch.log1p(-p)
    assume((reward.max() - reward.min()).item() < 15)         # beyond, 1 - p has lost too many digits to have a logit
    worth = (logit(tabular.preferences(reward)) * sampler.exp()).sum(-1)
    assert_same(worth, reward - world.expected(sampler, reward), 1e-8, what="E[logit p]")
    assert_same(tabular.psi_policy(ref, tabular.preferences(reward), sampler, logit, tau).exp(),
         world.optimal_policy(ref, reward, tau).exp(), 1e-8 * max(1, 1 / tau), what="PsiPO's optimum for the logit")


# ---- Noisy labels

@grades("dpo_loss")
@given(st.floats(0.01, 0.49), st.floats(-1, 1).map(lambda e: 10 ** e))
def test_conservative_dpo_stops_at_the_noises_log_odds(eps, beta):
    """Claim 28. cDPO's slope is zero at beta h = log((1 - eps)/eps), and nowhere else: it believes no label more than that."""
    stop = math.log((1 - eps) / eps) / beta
    h = vector(stop, 0.8 * stop - 0.1, 1.2 * stop + 0.1).requires_grad_()
    slope = torch.autograd.grad(losses_at(h, beta, label_smoothing=eps).sum(), h)[0]
    assert_same(slope[0], vector(0.0)[0], 1e-12, {"label_smoothing is ignored": vector(-beta * eps)[0]}, what="the slope at the stop")
    assert slope[1] < 0 < slope[2], "it must be the minimum"


@grades("dpo_loss")
@given(numbers(4, 30), st.floats(0, 0.49), betas)
def test_robust_dpo_is_unbiased_under_flipped_labels(h, eps, beta):
    """Claim 29. With labels flipped with probability eps, its mean (1 - eps) L(h) + eps L(-h) is the clean DPO loss; cDPO's
    is not."""
    mean = lambda kind: (1 - eps) * losses_at(h, beta, loss_type=kind, label_smoothing=eps) + eps * losses_at(-h, beta, loss_type=kind, label_smoothing=eps)
    assert_same(mean("robust"), softplus(-beta * h), 1e-10 / (1 - 2 * eps), {
        "this is cDPO, which is not unbiased": mean("sigmoid")}, what="robust DPO's mean over flipped labels")
    if eps > 0.05 and (beta * h).abs().max() > 0.1:
        assert (mean("sigmoid") - softplus(-beta * h)).abs().max() > 1e-6, "cDPO and robust DPO are two losses"


# ---- Numbers computed elsewhere; half a unit of their last printed digit

@grades("dpo_loss")
def test_oracle_three_pairs():
    """beta h = [0, 1, 2]: losses and rewards of three pairs, by another hand."""
    w, l, rw, rl = vector(-.5, -10, -1), vector(-.1, -30, -21), vector(-.5, -10.1, -.1), vector(-.1, -20.1, -.1)
    losses, chosen, rejected = dpo.dpo_loss(w, l, rw, rl, beta=0.1)
    assert_same(losses, vector(.693147, .313262, .126928), 5e-7, what="the losses")
    assert_same(chosen, vector(0, .01, -.09), 1e-12, {"rewards without beta": vector(0, .1, -.9)}, what="the chosen rewards")
    assert_same(rejected, vector(0, -.99, -2.09), 1e-12, {"rewards without beta": vector(0, -9.9, -20.9)}, what="the rejected rewards")
    assert_same(dpo.dpo_loss(w, l, rw, rl, beta=0.1, loss_type="hinge")[0], vector(1, 0, 0), 1e-12, what="the hinge losses")


@grades("dpo_loss")
@pytest.mark.parametrize("loss_type, loss, slope", [("sigmoid", .437488, -.035434), ("hinge", .4, -.1), ("ipo", 1.0, 2.0)])
def test_oracle_one_pair_loss_and_slope(loss_type, loss, slope):
    """beta = 0.1, h = 6."""
    h = vector(6.0).requires_grad_()
    losses = losses_at(h, 0.1, loss_type=loss_type)
    assert_same(losses.detach(), vector(loss), 5e-7, what="the loss")
    assert_same(torch.autograd.grad(losses.sum(), h)[0], vector(slope), 5e-7, what="dL/dh")


@grades("dpo_loss")
def test_oracle_mean_of_two():
    losses, _, _ = dpo.dpo_loss(vector(0, -1), vector(-1, 0), vector(-2, -1), vector(-1, -2), beta=0.1)
    assert_same(losses.mean(), vector(.698139)[0], 5e-7, what="the mean loss")


@grades("dpo_loss")
def test_oracle_label_smoothing():
    """beta h = 1, eps = 0.1: cDPO .413262, robust .188262."""
    assert_same(losses_at(1.0, 1.0, label_smoothing=0.1), vector(.413262), 5e-7, {"label_smoothing is ignored": vector(.313262)}, what="cDPO")
    assert_same(losses_at(1.0, 1.0, label_smoothing=0.1, loss_type="robust"), vector(.188262), 5e-7, {
        "this is cDPO": vector(.413262), "the factor 1/(1 - 2 eps) is missing": vector(.15061)}, what="robust DPO")
