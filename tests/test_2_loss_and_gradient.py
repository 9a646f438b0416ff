"""The loss and its gradient (section 4, Eq. 7, and what follows from it): against plain formulas, against a minimiser,
against differential equations solved by hand, and the gradient three ways.

float64; tolerances are stated where they are not 1e-10.
"""
import contextlib
import io
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import dpo
import tabular
import world
from tools import Bare, betas, grades, numbers, assert_same, softplus, vector, worlds

LN2 = math.log(2)


def loss_mistakes(w, l, rw, rl, beta):
    """What is often written instead of Eq. 7, and what it gives."""
    h = (w - l) - (rw - rl)
    return {
        "beta stands outside: you have -beta log sigma(h); Eq. 7 is -log sigma(beta h)": beta * softplus(-h),
        "your loss is right at beta = 0.1 only: is the argument beta used, inside the sigmoid?": softplus(-0.1 * h),
        "beta is missing: Eq. 7 is -log sigma(beta h)": softplus(-h),
        "beta is in it twice": softplus(-beta ** 2 * h),
        "the reference is ignored: that is CPO; Eq. 7 has log(pi/ref) on both sides": softplus(-beta * (w - l)),
        "the reference's log-ratio has the wrong sign: it is subtracted": softplus(-beta * ((w - l) + (rw - rl))),
        "the wrong response is preferred: chosen and rejected are swapped, or the sign of h is flipped": softplus(beta * h),
        "the minus sign is missing: log sigma is negative, its negative is minimised": -softplus(-beta * h),
        "the log is missing: -sigma(beta h) is not a negative log-likelihood": -torch.sigmoid(beta * h),
        "you return the mean; wanted the loss of each pair, (B,)": softplus(-beta * h).mean(),
        "you return the sum; wanted the loss of each pair, (B,)": softplus(-beta * h).sum(),
    }


def reward_mistakes(policy, ref, beta):
    return {
        "rewards without beta: r^ = beta (log pi - log ref)": policy - ref,
        "beta is in it twice: r^ = beta (log pi - log ref)": beta ** 2 * (policy - ref),
        "the reference is ignored: r^ = beta (log pi - log ref)": beta * policy,
        "ref and pi are swapped: r^ = beta (log pi - log ref)": beta * (ref - policy),
        "a mean over the batch; wanted the reward of each response, (B,)": beta * (policy - ref).mean(),
    }


def four(n=50, scale=5):
    return [scale * torch.randn(n, dtype=torch.float64) for _ in range(4)]


# ---- Eq. 7

@grades("preference_logits")
def test_h_is_the_policys_log_ratio_minus_the_references():
    """h = [log pi(y_w) - log pi(y_l)] - [log ref(y_w) - log ref(y_l)], Eq. 7 without beta."""
    w, l, rw, rl = four()
    assert_same(dpo.preference_logits(w, l, rw, rl), vector(*(a - b - c + d for a, b, c, d in zip(*(t.tolist() for t in (w, l, rw, rl))))),
         1e-12, {"the reference is ignored": w - l, "the reference's log-ratio has the wrong sign": (w - l) + (rw - rl),
                 "chosen and rejected are swapped": (l - w) - (rl - rw),
                 "beta = 0.1 is in it: h has none": 0.1 * ((w - l) - (rw - rl))}, what="h")


@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_loss_is_minus_log_sigma_of_beta_h(beta):
    """Eq. 7, 50 random pairs, against log1p and exp."""
    w, l, rw, rl = four(scale=2)
    assert_same(dpo.dpo_loss(w, l, rw, rl, beta=beta)[0], softplus(-beta * ((w - l) - (rw - rl))), 1e-12,
         loss_mistakes(w, l, rw, rl, beta), what="the loss")


@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_rewards_are_beta_times_the_log_ratio(beta):
    """r^ = beta log(pi/ref), section 4, chosen and rejected."""
    w, l, rw, rl = four(scale=2)
    _, chosen, rejected = dpo.dpo_loss(w, l, rw, rl, beta=beta)
    assert_same(chosen, beta * (w - rw), 1e-12, reward_mistakes(w, rw, beta), what="the chosen reward")
    assert_same(rejected, beta * (l - rl), 1e-12, reward_mistakes(l, rl, beta), what="the rejected reward")


@grades("dpo_loss")
@given(numbers(4, 50), betas)
def test_the_loss_is_minus_log_sigma_of_the_reward_margin(logps, beta):
    """For every pair and beta. Rewards without beta, or with beta twice, break this for every beta but 1."""
    losses, chosen, rejected = dpo.dpo_loss(*logps[:, None], beta=beta)
    assert_same(losses, softplus(-(chosen - rejected)), 1e-10 * max(1, beta), {
        "the rewards lack beta": softplus(-(chosen - rejected) * beta), "the rewards hold beta twice":
        softplus(-(chosen - rejected) / beta)}, what="the loss, from the rewards' margin")


@grades("dpo_loss")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@given(h=st.floats(-1e4, 1e4, width=16), beta=st.sampled_from([0.25, 1.0, 2.0]))
def test_finite_and_right_at_extreme_margins(dtype, tolerance, h, beta):
    """Margins up to +-1e4 in every precision: the loss is log(1 + e^(-beta h)) to the precision's own rounding, and its
    slope is finite. log(sigmoid(x)) underflows to -inf; logsigmoid does not."""
    x = torch.tensor([h], dtype=dtype, requires_grad=True)
    zero = torch.zeros(1, dtype=dtype)
    losses = dpo.dpo_loss(x, zero, zero, zero, beta=beta)[0]
    assert losses.isfinite().all(), f"the loss at beta h = {beta * h:g} is {losses.item()}: log(sigmoid(x)) underflows, logsigmoid does not"
    assert_same(losses.detach().double(), softplus(-beta * x.detach().double()), tolerance, what=f"the loss at h = {h:g}")
    slope = torch.autograd.grad(losses.sum(), x)[0]
    assert_same(slope.double(), -beta * torch.sigmoid(-beta * x.detach().double()), 2 * tolerance, what=f"the slope at h = {h:g}")


@grades("dpo_loss")
def test_the_rewards_carry_no_gradient():
    """They are for looking at: a reward left in the graph keeps its activations in memory, or is trained by mistake."""
    w, l, rw, rl = (t.requires_grad_() for t in four(3))
    losses, chosen, rejected = dpo.dpo_loss(w, l, rw, rl, beta=0.1)
    assert losses.requires_grad, "the loss carries no gradient: it is cut off from the policy"
    assert not chosen.requires_grad and not rejected.requires_grad, "detach the rewards"


@grades("dpo_loss")
@pytest.mark.parametrize("bad, message", [
    (dict(beta=0.0), "beta=0.0"), (dict(beta=-1.0), "beta=-1.0"), (dict(beta=float("nan")), "beta=nan"),
    (dict(label_smoothing=0.5), "label_smoothing=0.5"), (dict(label_smoothing=-0.1), "label_smoothing=-0.1"),
    (dict(label_smoothing=0.7), "label_smoothing=0.7"), (dict(loss_type="tanh"), "'tanh'"), (dict(loss_type=""), "''"),
    (dict(label_smoothing=0.1, loss_type="ipo"), "not defined"), (dict(label_smoothing=0.1, loss_type="hinge"), "not defined"),
    (dict(loss_type="dpo"), "'dpo'")])
def test_settings_that_mean_nothing_are_refused(bad, message):
    """A ValueError that names the value."""
    try:
        dpo.dpo_loss(*torch.zeros(4, 1), **bad)
    except ValueError as error:
        assert message in str(error), f"the message {str(error)!r} does not hold {message!r}"
    else:
        raise AssertionError(f"{bad} is accepted; wanted a ValueError that names the value")


@grades("dpo_loss")
def test_shapes_that_would_broadcast_are_refused():
    """(3,) against (3,1) would broadcast to (3,3) and train on pairs that do not exist."""
    for i in range(4):
        logps = [torch.zeros(3, 1) if i == j else torch.zeros(3) for j in range(4)]
        try:
            dpo.dpo_loss(*logps)
        except ValueError as error:
            assert "(3, 1)" in str(error), "the message must show the shapes"
        else:
            raise AssertionError(f"argument {i} of shape (3, 1) beside (3,) is accepted")


@grades("dpo_loss")
def test_defaults_are_plain_dpo_at_beta_one_tenth():
    w, l, rw, rl = four()
    assert_same(dpo.dpo_loss(w, l, rw, rl)[0], softplus(-0.1 * ((w - l) - (rw - rl))), 1e-12, what="the loss without options")


# ---- What the loss means

@grades("dpo_loss")
def test_at_the_reference_the_loss_is_ln2_and_the_gradient_is_not_zero():
    """Claim 8. pi = ref: loss ln 2 exactly, rewards 0, gradient -(beta/2)(grad log pi_w - grad log pi_l)."""
    w, l, rw, rl = four(4)
    w, l = rw.clone().requires_grad_(), rl.clone().requires_grad_()
    losses, chosen, rejected = dpo.dpo_loss(w, l, rw, rl, beta=0.3)
    assert_same(losses.detach(), torch.full_like(rw, LN2), 1e-15, what="the loss at pi = ref")
    assert not chosen.any() and not rejected.any(), "at pi = ref every implicit reward is exactly 0"
    grad_w, grad_l = torch.autograd.grad(losses.sum(), (w, l))
    assert_same(grad_w, torch.full_like(rw, -0.15), 1e-15, {"beta is lost": torch.full_like(rw, -0.5)}, what="dL/dlog pi(y_w)")
    assert_same(grad_l, torch.full_like(rl, 0.15), 1e-15, what="dL/dlog pi(y_l)")


@grades("dpo_loss")
@given(numbers(4, 20), st.floats(-50, 50), betas)
def test_the_reference_matters_through_its_log_ratio_only(logps, c, beta):
    """Claim 10. c(x) added to both reference log-probs changes nothing; added to one it changes h, and so the loss."""
    w, l, rw, rl = logps[:, None]
    losses, _, _ = dpo.dpo_loss(w, l, rw, rl, beta=beta)
    assert_same(dpo.dpo_loss(w, l, rw + c, rl + c, beta=beta)[0], losses, 1e-10 * max(1, beta), what="the loss with c(x) added to both")
    h = ((w - l) - (rw - rl)).item()
    assume(abs(beta * h) < 10 and beta > 0.01)         # where sigma is flat no change is seen
    assert dpo.dpo_loss(w, l, rw + 1, rl, beta=beta)[0] > losses, \
        "a reference that likes the chosen better must raise the loss: the reference is ignored (that is CPO), or its sign is wrong"


@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_the_minimiser_over_all_pairs_is_the_optimal_policy(beta):
    """Claim 11. All ordered pairs of ref x ref with exact Bradley-Terry labels: the gradient at pi* is zero (1e-12), and
    LBFGS from the reference ends within total variation 1e-8 of pi* = ref exp(r/beta)/Z, which the loss never saw."""
    ref, reward = tabular.random_world(6)
    preference, star = tabular.preferences(reward), world.optimal_policy(ref, reward, beta)
    loss = lambda theta: tabular.population_loss(torch.log_softmax(theta, -1), ref, preference, beta)
    theta = star.clone().requires_grad_()
    assert torch.autograd.grad(loss(theta), theta)[0].abs().max() < 1e-12, "the loss still pulls at pi*: its optimum is another policy"
    found = torch.log_softmax(tabular.minimise(loss, ref), -1)
    assert tabular.total_variation(ref, star) > 1e-3, "the two must be apart for this to mean something"
    distance = tabular.total_variation(found, star).item()
    assert distance < 1e-8, f"the minimiser is {distance:.2g} in total variation from pi*"


@grades("dpo_loss")
@given(worlds(policies=1), st.floats(-1, 1).map(lambda e: 10 ** e))
def test_the_excess_loss_is_a_kl_between_preferences(drawn, beta):
    """Claim 12. L(pi) - L(pi*) = E[KL(Bernoulli p* || Bernoulli p_pi)], and the least loss is the labels' entropy: a loss
    above zero is no failure. Plain sums; 1e-9."""
    ref, reward, pi = drawn
    reward = reward / 3
    p_star, q = tabular.preferences(reward), ref.exp()
    s = beta * ((pi - ref)[:, None] - (pi - ref)[None, :])
    plogp = lambda p: torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0)
    entropy = -(q[:, None] * q[None, :] * (plogp(p_star) + plogp(1 - p_star))).sum()
    excess = (q[:, None] * q[None, :] * (plogp(p_star) + plogp(1 - p_star) + p_star * softplus(-s) + (1 - p_star) * softplus(s))).sum()
    star = world.optimal_policy(ref, reward, beta)
    least = tabular.population_loss(star, ref, p_star, beta)
    assert_same(least, entropy, 1e-9, what="the loss at pi*")
    assert_same(tabular.population_loss(pi, ref, p_star, beta) - least, excess, 1e-9, what="the excess loss")
    assert excess > -1e-12


def test_plackett_luce_over_all_rankings():
    """Claim 13 (Eq. 18 and 20). The 4! probabilities sum to 1; summed over rankings with i before j they give sigma(r_i - r_j);
    for two responses the ranking loss is Eq. 7's."""
    ref, reward = tabular.random_world(4)
    rankings = list(itertools.permutations(range(4)))
    p = {ranking: tabular.plackett_luce(reward, list(ranking)).exp().item() for ranking in rankings}
    assert sum(p.values()) == pytest.approx(1, abs=1e-12)
    by_hand = lambda ranking: math.prod(math.exp(reward[a]) / sum(math.exp(reward[b]) for b in ranking[k:]) for k, a in enumerate(ranking))
    for ranking in rankings:
        assert p[ranking] == pytest.approx(by_hand(ranking), abs=1e-12)
    for i, j in itertools.permutations(range(4), 2):
        before = sum(value for ranking, value in p.items() if ranking.index(i) < ranking.index(j))
        assert before == pytest.approx(1 / (1 + math.exp(reward[j] - reward[i])), abs=1e-12)
    pi = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)
    h = (pi[2] - pi[1]) - (ref[2] - ref[1])
    assert_same(tabular.plackett_luce_loss(pi, ref, [2, 1], beta=0.4), softplus(-0.4 * h), 1e-12, what="Eq. 20 for two responses")


# ---- How fast, and how far

@grades("dpo_loss")
@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("time", [0.3, 5.0])
def test_one_deterministic_pair_grows_without_bound(beta, time):
    """Claim 14. Gradient flow on the logits of one pair that is always labelled alike: e^(beta h) + beta h = 1 + 2 beta^2 t:
    unbounded, logarithmic. Runge-Kutta to 1e-8."""
    ref = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)
    h_of = lambda theta: (theta[0] - theta[1]) - (ref[0] - ref[1])

    def loss(theta):
        logps = torch.log_softmax(theta, -1)
        return dpo.dpo_loss(logps[:1], logps[1:2], ref[:1], ref[1:2], beta=beta)[0].sum()
    h = h_of(tabular.gradient_flow(loss, ref, time))
    assert_same(torch.exp(beta * h) + beta * h, vector(1 + 2 * beta ** 2 * time)[0], 1e-8,
         {"beta is lost in the gradient": torch.exp(h) + h}, what="e^(beta h) + beta h")
    assert h > 0


def test_without_the_weight_the_margin_grows_linearly():
    """Claim 15. The same pair without the weight sigma(r^_l - r^_w), that is the loss -beta h: h = 2 beta t, for ever; the
    weight is what slows a pair down once it is ranked rightly (section 4)."""
    beta, time = 0.5, 5.0
    ref = torch.log_softmax(torch.randn(4, dtype=torch.float64), -1)
    h_of = lambda theta: (theta[0] - theta[1]) - (ref[0] - ref[1])
    theta = tabular.gradient_flow(lambda theta: -beta * h_of(torch.log_softmax(theta, -1)), ref, time)
    assert_same(h_of(theta), vector(2 * beta * time)[0], 1e-10, what="h without the weight")
    weighted = tabular.gradient_flow(lambda theta: softplus(-beta * h_of(torch.log_softmax(theta, -1))), ref, time)
    assert 0 < h_of(weighted) < h_of(theta) / 2


@grades("dpo_loss")
def test_the_curvature_is_a_graph_laplacian():
    """Claim 16. The Hessian in the logits is beta^2 times the Laplacian of the comparison graph with edge weights
    mu_ij sigma(beta h) sigma(-beta h): positive semidefinite, with a null vector for every component of the graph, here
    two. And gradient descent contracts at 1 - eta lambda_2 near the optimum."""
    n, beta = 6, 0.7
    ref, reward = tabular.random_world(n)
    preference = tabular.preferences(reward)
    drawn = torch.rand(n, n, dtype=torch.float64)
    drawn = torch.triu(drawn, 1) + torch.triu(drawn, 1).T
    apart = torch.arange(n) < 4                                    # responses 0-3 are never compared with 4 and 5
    drawn = torch.where(apart[:, None] == apart[None, :], drawn, 0.0)
    drawn = drawn / drawn.sum()
    loss = lambda theta: tabular.population_loss(torch.log_softmax(theta, -1), ref, preference, beta, drawn)
    theta = torch.randn(n, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(loss, theta)
    h = (theta - ref)[:, None] - (theta - ref)[None, :]
    # both labels of a comparison bend alike: sigma(x) sigma(-x) is even, so the labels' noise does not enter
    weights = 2 * drawn * torch.sigmoid(beta * h) * torch.sigmoid(-beta * h)
    assert_same(hessian, beta ** 2 * tabular.laplacian(weights), 1e-12, {
        "beta^2 is lost": tabular.laplacian(weights), "beta once instead of twice": beta * tabular.laplacian(weights)}, what="the Hessian")
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert eigenvalues.min() > -1e-12 and (eigenvalues < 1e-10).sum() == 2
    for component in (apart.double(), (~apart).double()):
        assert (hessian @ component).abs().max() < 1e-12, "h sees no shift common to a component"

    drawn = torch.ones(n, n, dtype=torch.float64) / n ** 2         # connected, for the rate
    loss = lambda theta: tabular.population_loss(torch.log_softmax(theta, -1), ref, preference, beta, drawn)
    star = world.optimal_policy(ref, reward, beta)
    eigenvalues, directions = torch.linalg.eigh(torch.autograd.functional.hessian(loss, star))
    eta = 0.9 / eigenvalues[-1]
    theta, size = star + 1e-4 * directions[:, 1:].sum(-1), []      # off by as much in every direction that the loss sees
    for _ in range(40):
        leaf = theta.clone().requires_grad_()
        theta = theta - eta * torch.autograd.grad(loss(leaf), leaf)[0]
        size.append((theta - star) @ directions[:, 1])             # what is left in the slowest one
    assert_same(size[3] / size[2], 1 - eta * eigenvalues[1], 1e-3, what="what a step leaves of the slowest direction")
    left = (theta - star - (theta - star).mean()).norm()
    assert left < 2 * 1e-4 * (n - 1) ** 0.5 * (1 - eta * eigenvalues[1]) ** 40 + 1e-12


def test_regressing_reward_differences_has_the_same_target_and_more_curvature():
    """Claim 17. The loss (beta h - (r_i - r_j))^2 / 2 also ends at pi*; its Hessian is beta^2 Laplacian(mu), at least
    four times that of DPO in every direction: same target, different speed."""
    n, beta = 5, 0.7
    ref, reward = tabular.random_world(n)
    drawn = (ref.exp()[:, None] * ref.exp()[None, :]).fill_diagonal_(0)
    difference = lambda v: v[:, None] - v[None, :]
    regression = lambda theta: (drawn * (beta * difference(torch.log_softmax(theta, -1) - ref) - difference(reward)) ** 2 / 2).sum()
    loss = lambda theta: tabular.population_loss(torch.log_softmax(theta, -1), ref, tabular.preferences(reward), beta)
    star = world.optimal_policy(ref, reward, beta)
    assert tabular.total_variation(torch.log_softmax(tabular.minimise(regression, ref), -1), star) < 1e-8
    hessian = torch.autograd.functional.hessian(regression, star)
    assert_same(hessian, beta ** 2 * tabular.laplacian(2 * drawn), 1e-12, what="the regression's Hessian")
    for theta in (ref, star, torch.randn(n, dtype=torch.float64)):
        gap = torch.linalg.eigvalsh(hessian - 4 * torch.autograd.functional.hessian(loss, theta))
        assert gap.min() > -1e-12, "sigma(x) sigma(-x) is at most 1/4"
    at_ref = torch.autograd.functional.hessian(loss, ref)
    assert_same(hessian, 4 * at_ref, 1e-12, what="four times DPO's curvature at the reference, where sigma(0) = 1/2,")


# ---- The gradient: the weight, the analytic form, and the check

@grades("gradient_weight")
@given(numbers(2, 30))
def test_the_weight_is_sigma_of_rejected_minus_chosen(rewards):
    """Section 4: near 1 where the implicit reward ranks the pair wrongly, 1/2 where it sees no difference."""
    chosen, rejected = rewards[:, None]
    assert_same(dpo.gradient_weight(chosen, rejected), 1 / (1 + torch.exp(chosen - rejected)), 1e-12, {
        "the sign is flipped: sigma(r^_l - r^_w) is large where the pair is ranked WRONGLY": 1 / (1 + torch.exp(rejected - chosen)),
        "that is the log of the weight": -softplus(chosen - rejected)}, what="the weight")


@grades("gradient_weight")
def test_the_weight_at_no_difference_and_at_extremes():
    """1/2 at the reference (claim 8); 0 and 1, not nan, at margins of +-1e4."""
    assert_same(dpo.gradient_weight(vector(0, 3, 1e4, -1e4), vector(0, 3, 0, 0)), vector(0.5, 0.5, 0, 1), 1e-12, what="the weight")


def pair_gradients(policy, batch):
    """(log pi(y_w), its gradient, log pi(y_l), its gradient) of each pair, one sequence at a time and token by token; the
    gradients flattened over all parameters. Uses nothing of dpo.py."""
    params, size = list(policy.parameters()), len(batch["tokens"]) // 2
    for i in range(size):
        out = []
        for row in (i, i + size):
            logits = policy(batch["tokens"][row:row + 1])[0]
            logp = sum(torch.log_softmax(logits[t - 1], -1)[batch["tokens"][row, t]]
                       for t in range(batch["tokens"].size(1)) if batch["response_mask"][row, t])
            out += [logp.item(), torch.cat([g.flatten() for g in torch.autograd.grad(logp, params)])]
        yield out


def weighted_gradient(policy, batch, beta, weight):
    """-beta mean[weight(r^_w, r^_l) (grad log pi_w - grad log pi_l)], flattened."""
    terms = [-beta * weight(beta * (w - rw), beta * (l - rl)) * (grad_w - grad_l) for (w, grad_w, l, grad_l), rw, rl in
             zip(pair_gradients(policy, batch), batch["ref_chosen_logps"].tolist(), batch["ref_rejected_logps"].tolist())]
    return sum(terms) / len(terms)


@grades("analytic_gradient")
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_analytic_gradient_against_one_pair_at_a_time(tiny, beta):
    """Claim 9 (section 4). An oracle that uses neither the loss nor the batch: for each pair, the two gradients and the weight
    by hand; 1e-12."""
    sigma = lambda x: 1 / (1 + math.exp(-x))
    mistake = lambda weight, scale=1: scale * weighted_gradient(*tiny, beta, weight)
    gradient = dpo.analytic_gradient(*tiny, beta)
    assert gradient is not None, "analytic_gradient returned None: is a return missing?"
    for part, p in zip(gradient, tiny[0].parameters(), strict=True):
        assert part.shape == p.shape, "a list of tensors, one a parameter, in the order of policy.parameters()"
    assert_same(torch.cat([g.flatten() for g in gradient]), weighted_gradient(*tiny, beta, lambda w, l: sigma(l - w)), 1e-12, {
        "the weight's sign is flipped: it is sigma(r^_l - r^_w), large for pairs ranked wrongly": mistake(lambda w, l: sigma(w - l)),
        "the weight is missing": mistake(lambda w, l: 1),
        "the weight lacks beta: it is sigma of rewards, and rewards hold beta": mistake(lambda w, l: sigma((l - w) / beta)),
        "the factor beta is missing": mistake(lambda w, l: sigma(l - w), 1 / beta),
        "it is the gradient that raises the loss: the minus sign is missing": mistake(lambda w, l: sigma(l - w), -1),
        "a sum over pairs; wanted the mean": mistake(lambda w, l: sigma(l - w), 3),
        "the gradients of chosen and rejected are added, not subtracted": sum(
            -beta * sigma(beta * (l - rl - w + rw)) * (gw + gl) / 3 for (w, gw, l, gl), rw, rl in zip(
                pair_gradients(*tiny), tiny[1]["ref_chosen_logps"].tolist(), tiny[1]["ref_rejected_logps"].tolist())),
    }, what="the gradient")


@grades("analytic_gradient")
def test_analytic_gradient_is_autograd_of_the_loss(tiny):
    """Claim 9. The same numbers from PyTorch's gradient of the mean of Eq. 7, written out here; 1e-9."""
    policy, batch = tiny
    beta, params = 0.7, list(policy.parameters())
    logps = torch.log_softmax(policy(batch["tokens"])[:, :-1], -1).gather(2, batch["tokens"][:, 1:, None]).squeeze(2)
    logps = (logps * batch["response_mask"][:, 1:]).sum(1)
    h = (logps[:3] - logps[3:]) - (batch["ref_chosen_logps"] - batch["ref_rejected_logps"])
    autograd = torch.autograd.grad(softplus(-beta * h).mean(), params)
    for ours, theirs in zip(dpo.analytic_gradient(policy, batch, beta), autograd, strict=True):
        assert theirs.abs().max() > 1e-6, "a gradient of zeros would pass any comparison with zeros"
        assert_same(ours, theirs, 1e-9, {"a sum over pairs; wanted the mean": 3 * theirs}, what="the gradient of a parameter")


@grades("analytic_gradient")
def test_any_module_that_maps_tokens_to_logits_will_do(tiny):
    """Not only model.GPT, whose head can run on some positions alone: the same gradient through full logits (1e-12)."""
    policy, batch = tiny
    for a, b in zip(dpo.analytic_gradient(Bare(policy), batch, 0.7), dpo.analytic_gradient(policy, batch, 0.7), strict=True):
        assert_same(a, b, 1e-12, what="the gradient of a module without hidden()")


@grades("central_differences")
def test_central_differences_of_a_cubic():
    """d(x^3)/dx = 3x^2 to 1e-8: the error of central differences is eps^2, of one-sided ones eps."""
    x = vector(1.0, -2.0, 0.5)
    for eps in (1e-5, 1e-3):
        right = 3 * x ** 2
        assert_same(dpo.central_differences(lambda: (x ** 3).sum(), x, eps), right + eps ** 2, 1e-9, {
            "(up - down) must be divided by 2 eps": 2 * right + 2 * eps ** 2,
            "one-sided: move the entry both ways": right + 3 * x * eps + eps ** 2}, what="the differences")
        assert torch.equal(x, vector(1.0, -2.0, 0.5)), "every entry must be put back as it was"
    matrix = torch.randn(2, 3, dtype=torch.float64)
    assert_same(dpo.central_differences(lambda: (matrix ** 2).sum(), matrix), 2 * matrix, 1e-8, what="the differences of a matrix")


@grades("central_differences")
def test_central_differences_of_a_parameter():
    """x may require a gradient, as parameters do: it is moved in place without autograd noticing, by 1e-5 if not told."""
    x = torch.nn.Parameter(vector(0.5, -1.0))
    asked = []

    def f():
        asked.append(x.detach().clone())
        return (x ** 2).sum()
    assert_same(dpo.central_differences(f, x), 2 * x.detach(), 1e-8, what="the differences")
    moves = torch.stack(asked) - x.detach()
    assert len(asked) == 4 and moves.abs().max().item() == pytest.approx(1e-5, rel=1e-6), "each entry, by eps both ways"


@grades("gradient_check")
def test_the_check_agrees_at_every_level(tiny):
    """Claim 9. The analytic gradient against autograd (1e-9) and against differences (1e-6), at the level of the log-probs,
    the logits and every parameter; largest entries far from zero."""
    rows = list(dpo.gradient_check(*tiny, beta=0.7))
    assert [name for name, *_ in rows] == ["log pi(y_w|x)", "log pi(y_l|x)", "logits"] + [n for n, _ in tiny[0].named_parameters()]
    shapes = [(3,), (3,), (6, 7, 9)] + [tuple(p.shape) for p in tiny[0].parameters()]
    for (name, shape, autograd, differences, largest), wanted in zip(rows, shapes, strict=True):
        assert shape == wanted
        assert autograd <= 1e-9, f"{name}: the weight is sigma(r_l - r_w), times -beta: is a sign or beta lost?"
        assert differences <= 1e-6, f"{name}: autograd agrees and differences do not: is the loss itself another one?"
        assert largest > 1e-6, f"{name}: a gradient of zeros would pass any comparison with zeros"


@grades("gradient_check")
def test_the_check_reports_the_size_of_the_gradient(tiny):
    """The last column of the first rows by hand: beta sigma(r^_l - r^_w) / B, of the pair with the largest weight."""
    policy, batch = tiny
    rows = {name: row for name, *row in dpo.gradient_check(policy, batch, beta=0.7)}
    weights = [0.7 / (1 + math.exp(0.7 * (w - rw - l + rl))) / 3 for (w, _, l, _), rw, rl in
               zip(pair_gradients(policy, batch), batch["ref_chosen_logps"].tolist(), batch["ref_rejected_logps"].tolist())]
    for name in ("log pi(y_w|x)", "log pi(y_l|x)"):
        assert_same(rows[name][3], vector(max(weights))[0], 1e-12, {"beta is missing": vector(max(weights) / 0.7)[0],
             "a sum over pairs; wanted the mean": vector(max(weights) * 3)[0]}, what=f"the largest entry for {name}")
    largest = max(abs(v) for v in weighted_gradient(policy, batch, 0.7, lambda w, l: 1 / (1 + math.exp(w - l))).tolist())
    assert_same(max(row[3] for name, row in rows.items() if "log" not in name), vector(largest)[0], 1e-12, what="the largest entry for a parameter")


@grades("gradient_check")
def test_the_check_notices_a_gradient_that_lies(tiny):
    """A model whose backward pass is wrong: autograd and the analytic form, which both rest on it, agree, and only the
    differences tell. The check must report them as apart."""
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    class Liar(Bare):
        def forward(self, tokens):
            return Doubled.apply(self.gpt(tokens))

    rows = list(dpo.gradient_check(Liar(tiny[0]), tiny[1], beta=0.7))
    assert max(row[2] for row in rows) <= 1e-9
    assert max(row[3] for row in rows[3:]) > 1e-3, "the differences say the gradient is wrong, and the check does not"


@pytest.mark.parametrize("name, wrong", [("gradient_weight", lambda w, l: torch.sigmoid(w - l)),
                                         ("analytic_gradient", lambda p, b, beta: [torch.zeros_like(x) for x in p.parameters()])])
def test_the_check_notices_a_wrong_formula(tiny, monkeypatch, name, wrong):
    """With the weight's sign flipped, or zeros for a gradient, the check must report a difference from autograd."""
    monkeypatch.setattr(dpo, name, wrong)
    assert max(row[2] for row in dpo.gradient_check(*tiny, beta=0.7)) > 1e-3


def run_main(show=False):
    """What dpo.main() prints; it works in float64 and must not leave the process so."""
    out = io.StringIO()
    with contextlib.nullcontext() if show else contextlib.redirect_stdout(out):
        try:
            dpo.main()
        finally:
            torch.set_default_dtype(torch.float32)
    return out.getvalue()


def test_the_command_prints_the_table():
    """Log-probs, logits, two embeddings, two blocks of 12 tensors, the last LayerNorm; none WRONG, all small, none zero."""
    printed = run_main()
    rows = [line for line in printed.splitlines() if line.endswith(("  exact", "  approximate", "  WRONG"))]
    assert len(rows) == 3 + 2 + 2 * 12 + 2
    for row in rows:
        assert not row.endswith("WRONG")
        largest, autograd, differences = map(float, row.split()[-4:-1])
        assert largest > 1e-6 and autograd <= 1e-9 and differences <= 1e-6
    weights = printed.split("weights sigma(r_l - r_w) = ")[1].splitlines()[0].split(", ")
    assert len(set(weights)) == 3, "the pairs' weights must differ, or a constant weight would pass"


@pytest.mark.parametrize("autograd, differences, largest, verdict", [
    (0.0, 1e-10, 1.0, "exact"), (1e-14, 1e-10, 1.0, "exact"), (1e-14, 1e-10, 0.01, "exact"), (3e-14, 1e-10, 5.0, "exact"),
    (3e-14, 1e-10, 1.0, "approximate"), (1e-13, 1e-10, 5.0, "approximate"), (1e-9, 1e-6, 1.0, "approximate"),
    (2e-9, 1e-10, 1.0, "WRONG"), (0.0, 2e-6, 1.0, "WRONG"), (math.nan, 1e-10, 1.0, "WRONG"), (0.0, math.nan, 1.0, "WRONG")])
def test_the_commands_verdicts_are_those_it_explains(monkeypatch, autograd, differences, largest, verdict):
    """exact: 1e-14 of the largest entry, or of 1; approximate: 1e-9; both within 1e-6 of the differences; else WRONG, and then
    the command fails, naming the row and no other."""
    monkeypatch.setattr(dpo, "gradient_check", lambda *a: iter([("good", (1,), 0.0, 0.0, 1.0), ("row", (3,), autograd, differences, largest)]))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if verdict == "WRONG":
            with pytest.raises(SystemExit, match="^the gradient is wrong for row: "):
                run_main(show=True)
        else:
            run_main(show=True)
    line = next(line for line in out.getvalue().splitlines() if line.startswith("row"))
    assert line.split()[-1] == verdict


def test_the_command_checks_a_batch_worth_checking(monkeypatch):
    """Two answers to each prompt, of several lengths, none empty, one as long as the model reads; the masks begin where the
    answers do; the policy has left the reference, and the printed beta is the one checked."""
    seen = []

    def record(policy, batch, beta):
        seen.append((policy, batch, beta))
        return iter(())
    monkeypatch.setattr(dpo, "gradient_check", record)
    printed = run_main()
    (policy, batch, beta), = seen
    tokens, mask = batch["tokens"], batch["response_mask"]
    assert f"on 3 pairs, a {policy.config.n_layer}-layer GPT, float64, beta = {beta}." in printed and beta != 1
    assert tokens.shape == mask.shape == (6, policy.config.block_size) and tokens.max() < policy.config.vocab_size
    starts, lengths = mask.int().argmax(1), mask.sum(1)
    assert (starts == starts[0]).all() and starts[0] > 0 and lengths.min() > 0 and len(lengths.unique()) >= 4
    assert starts[0] + lengths.max() == tokens.size(1)
    for row, start, length in zip(mask, starts, lengths):
        assert row[start:start + length].all(), "a response is in one piece"
    assert torch.equal(tokens[:3, :starts[0]], tokens[3:, :starts[0]]), "both answers of a pair answer one prompt"
    assert (tokens[:3, starts[0]:] != tokens[3:, starts[0]:]).any(1).all(), "and differ"
    assert all(p.dtype == torch.float64 and p.abs().sum() > 0 for p in policy.parameters())
    policy_logps, ref_logps = torch.cat(dpo.pair_logps(policy, batch)), torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    assert ((policy_logps - ref_logps).abs() > 1e-3).all() and (ref_logps < 0).all() and not ref_logps.requires_grad


@pytest.mark.parametrize("name, wrong", [("gradient_weight", lambda w, l: torch.sigmoid(w - l)),
                                         ("central_differences", lambda f, x, eps=1e-5: torch.zeros_like(x))])
def test_the_command_says_wrong_where_it_is_wrong(monkeypatch, name, wrong):
    """And exits with the names of the levels that differ."""
    monkeypatch.setattr(dpo, name, wrong)
    with pytest.raises(SystemExit, match=r"the gradient is wrong for log pi\(y_w\|x\)"):
        run_main()
