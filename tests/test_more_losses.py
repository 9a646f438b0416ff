"""lab/more_losses.py, the league of losses: each function gives its formula, and nothing else does.

Three oracles, none of them the code under test. (1) Numbers that were computed elsewhere, most of
them by TRL 1.16.0 or by the trainers of the papers' authors, to half a unit of their last digit,
5e-7. (2) The formulas in plain floats, pair by pair, to 1e-12. (3) Central differences for the
gradients, to 1e-7. Then minimisers: the expected loss over all pairs of a small tabular world is
minimised by LBFGS and compared with the closed form, to 1e-6. All in float64.
test_more_losses_trl.py executes TRL beside these functions.
"""
import inspect
import math

import pytest
import torch

import dpo
import losses
import world
from lab import more_losses, tabular
from lab.more_losses import LEAGUE
from tools import assert_refused, assert_same, softplus, vector

# Two pairs. log(pi/ref) is c of the chosen response and j of the rejected one, and h = c - j.
PAIRS = vector(-5, -8), vector(-6, -7), vector(-5.5, -7.5), vector(-5.8, -7.2)
PC, PR, RC, RR = PAIRS
C, J = PC - RC, PR - RR  # [.5, -.5], [-.2, .2]
H = C - J  # [.7, -.7]
LC, LR = vector(4, 8), vector(6, 10)
BOTH = {"chosen_lengths": LC, "rejected_lengths": LR}
KLS = {"chosen_kl": vector(.3, .1), "rejected_kl": vector(.2, .4)}
DESIRABLE = {"kl": .2, "undesirable_weight": 0}
UNDESIRABLE = {"kl": .2, "desirable_weight": 0}

# (name, further arguments, the losses of both pairs at beta = 0.1, and at beta = 1). Arguments that
# are not given have their defaults.
NUMBERS = [
    ("rpo", {"chosen_lengths": LC}, (1.908760, 1.728760), (1.653186, 2.103186)),
    ("dpop", {"lam": 5}, (.658760, .865893), (.403186, 3.239953)),
    ("dpop", {}, (.658760, 2.643748), (.403186, 25.7)),
    ("r_dpo", BOTH | {"alpha": .05}, (.708260, .781755), (.437488, 1.171101)),
    ("r_dpo", BOTH, (.668460, .739159), (.409867, 1.116594)),
    ("tdpo1", KLS, (.653947, .744397), (.371101, 1.313262)),
    ("tdpo2", KLS, (.656350, .736550), (.386871, 1.205865)),
    ("chi_po", {}, (.619571, .761050), (.196009, 1.552714)),
    ("chi_po", {"r_max": .5}, (.619571, .761050), (.313262, 1.313262)),
    ("exo_pair", {}, (2.641024, 2.882662), (1.657292, 3.980555)),
    ("discopop", {}, (.878265, .796759), (.496585, 1.103187)),
    ("aot", {}, (.728760, .658760), (1.103186, .403186)),
    ("sigmoid_norm", BOTH, (.685262, .697281), (.617111, .735248)),
    ("nca_pair", {}, (1.369288, 1.404288), (1.260185, 1.610185)),
    ("bco_pair", {}, (1.351657, 1.421657), (1.072216, 1.772216)),
    ("sppo_hard", {}, (43.29, 57.29), (.09, 1.49)),
    ("cal_dpo", {}, (22.048186, 29.748186), (.448186, 1.848186)),
    ("cal_dpo", {"weight": 1}, (43.693186, 58.393186), (.493186, 2.593186)),
    ("apo_zero", {}, (.982503, 1.017497), (.827707, 1.172293)),
    ("apo_down", {}, (.995005, 1.004995), (.954272, 1.045728)),
    ("kto", DESIRABLE, (.492501, .517493), (.425557, .668188)),
    ("kto", UNDESIRABLE, (.490001, .500000), (.401312, .500000)),
    ("pro", {}, (2.045416, 2.115416), (1.825402, 2.525402)),
    ("slic_hf", {"lam": 0}, (.9, 1.1), (0, 2)),
    ("slic_hf", {}, (1.4, 1.9), (.5, 2.8)),
    ("cpo", {"chosen_lengths": LC, "alpha": 0}, (.644397, .744397), (.313262, 1.313262)),
    ("cpo", {"chosen_lengths": LC}, (1.894397, 1.744397), (1.563262, 2.313262)),
    ("orpo", BOTH, (1.339581, 1.099139), (2.145811, 1.991388)),
    ("rda", {"chosen_true": vector(2, 0), "rejected_true": vector(1, -1)},
     (.8649, 1.1449), (.09, 2.89)),
    ("pra", {"preference": vector(1, 1)}, (.658760, .728760), (.403186, 1.103186)),
]


def loss_of(name, *logps, **arguments):
    """The losses (B,) of a name of LEAGUE."""
    return LEAGUE[name][0](*logps, **arguments)


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def mistakes_of(name, b, want, want_at_one, further):
    """What is often written instead of a loss, and the value that it gives for PAIRS, (2,).

    want, want_at_one: the losses at beta = b and at beta = 1. further: the further arguments.
    """
    further = LEAGUE[name][1] | further
    lam, alpha, kl = (further.get(argument, 0) for argument in ("lam", "alpha", "kl"))
    log_odds = [p - torch.log(1 - torch.exp(p)) for p in (PC / LC, PR / LR)]
    of_all = {
        "beta is missing": want_at_one,
        "the sign of the loss is flipped": -want,
        "this is the mean; wanted the loss of each pair, (B,)": want.mean(),
        "each loss is divided by the number of pairs; the caller takes the mean": want / 2,
        "this is the DPO loss": softplus(-b * H),
    }
    return of_all | {
        "rpo": {
            "the likelihood is a sum over tokens; divide it by the length": softplus(-b * H) - PC,
            "the likelihood is that of the reference": softplus(-b * H) - RC / LC,
            "the likelihood has the wrong sign": softplus(-b * H) + PC / LC},
        "dpop": {
            "the penalty stands outside sigma": softplus(-b * H) + lam * torch.relu(-C),
            "beta does not multiply the penalty": softplus(-b * H + lam * torch.relu(-C)),
            "the penalty is there where the chosen response has gained":
                softplus(-b * (H - lam * torch.relu(C)))},
        "r_dpo": {"the length term has the wrong sign": softplus(-b * H + alpha * (LC - LR)),
                  "beta multiplies the length term": softplus(-b * (H + alpha * (LC - LR)))},
        "tdpo1": {"D_l - D_w has the wrong sign": softplus(-b * (H + vector(-.1, .3)))},
        "tdpo2": {"D_l - D_w has the wrong sign": softplus(-b * (H + .5 * vector(-.1, .3))),
                  "alpha is missing: this is TDPO1": softplus(-b * (H - vector(-.1, .3)))},
        "exo_pair": {"this is the forward KL, cDPO":
                     .999 * softplus(-b * H) + .001 * softplus(b * H)},
        "discopop": {"m and 1 - m are swapped":
                     sigma(b * H / .05) * softplus(-b * H)
                     + sigma(-b * H / .05) * torch.exp(-b * H)},
        "aot": {"the margins are not sorted": want.flip(0)},
        "sigmoid_norm": {"the lengths are swapped": softplus(-b * (C / LR - J / LC))},
        "nca_pair": {"both halves are missing":
                     softplus(-b * C) + softplus(b * C) + softplus(b * J)},
        "bco_pair": {"the rejected term has the wrong sign": softplus(-b * C) + softplus(-b * J)},
        "sppo_hard": {"the target is 1/(2 beta), not 1/beta": (C - 1 / b) ** 2 + (J + 1 / b) ** 2,
                      "both targets have one sign": (C - .5 / b) ** 2 + (J - .5 / b) ** 2},
        "cal_dpo": {"beta is inside sigma; Cal-DPO has none there":
                    softplus(-b * H) + .5 * ((C - .5 / b) ** 2 + (J + .5 / b) ** 2)},
        "apo_zero": {"both responses are pushed up": sigma(-b * C) + sigma(-b * J)},
        "apo_down": {"this is APO-zero": sigma(-b * C) + sigma(b * J),
                     "beta h has the wrong sign": sigma(b * C) + sigma(b * H)},
        "kto": {"kl is not subtracted": [sigma(-b * C), sigma(b * J)],
                "beta does not multiply kl": [sigma(-(b * C - kl)), sigma(b * J - kl)]},
        "pro": {"the sum is not halved":
                softplus(-b * H) + softplus(b * C) + softplus(-b * C)
                + softplus(b * J) + softplus(-b * J)},
        "slic_hf": {"SLiC-HF has no reference; this is RSO's hinge": torch.relu(1 - b * H)},
        "cpo": {"the likelihood is a sum over tokens; divide it by the length":
                softplus(-b * (PC - PR)) - PC},
        "simpo": {"beta multiplies gamma": softplus(b * b / 2 - b * (PC / LC - PR / LR)),
                  "these are sums over tokens; SimPO takes means": softplus(b / 2 - b * (PC - PR)),
                  "gamma has the wrong sign": softplus(-b / 2 - b * (PC / LC - PR / LR))},
        "orpo": {"the likelihood term is missing": want + PC / LC,
                 "these are log-probabilities; ORPO compares log-odds":
                     b * softplus(-(PC / LC - PR / LR)) - PC / LC,
                 "beta stands inside sigma; here it is the weight of the second term":
                     softplus(-b * (log_odds[0] - log_odds[1])) - PC / LC},
        "rda": {"the difference of rewards has the wrong sign": (b * H + 1) ** 2,
                "beta is missing": (H - 1) ** 2},
    }.get(name, {})


@pytest.mark.parametrize("name, further, at_tenth, at_one", [
    *NUMBERS,
    ("simpo", BOTH | {"gamma": .05}, (.731350, .733947), None),  # gamma is half of beta here
    ("simpo", BOTH, None, (1.136871, 1.171101)),
])
def test_the_losses_of_two_pairs_that_were_computed_elsewhere(name, further, at_tenth, at_one):
    """Every loss at beta = 0.1 and beta = 1, pair by pair, to 5e-7. A loss that is zero, that has
    its sign flipped or that lacks beta fails."""
    for beta, numbers in ((0.1, at_tenth), (1.0, at_one)):
        if numbers is not None:
            want = vector(*numbers)
            mistakes = mistakes_of(name, beta, want, vector(*(at_one or numbers)), further)
            assert_same(loss_of(name, *PAIRS, beta=beta, **further), want, 5e-7, mistakes,
                        what=f"the {name} loss at beta = {beta:g}")


def test_the_numbers_tell_the_mistakes_apart():
    """At beta = 0.1 each mistake changes the losses by more than 1e-3. The test above sees it."""
    for name, further, at_tenth, at_one in NUMBERS:
        want = vector(*at_tenth)
        assert want.abs().min() > 0.1, f"zeros would pass for {name}"
        for mistake, values in mistakes_of(name, 0.1, want, vector(*at_one), further).items():
            for value in values if isinstance(values, list) else [values]:
                if (name, mistake) != ("pra", "this is the DPO loss"):  # with P = 1 it is
                    same = value.shape == want.shape and (value - want).abs().max() < 1e-3
                    assert not same, f"{name}: {mistake}"


# ---- The formulas in plain floats

def sp(x):
    """-log sigma(-x)"""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def s(x):
    return 1 / (1 + math.exp(-x))


def phi(x):
    return math.exp(x) + x


def logit(p):
    return math.log(p / (1 - p))


# c, j: log(pi/ref) of the chosen and the rejected response; b: beta; x: all arguments by name.
# -log sigma(z) is written sp(-z).
BY_HAND = {
    "rpo": lambda c, j, b, x: sp(b * (j - c)) - x["alpha"] * x["chosen"] / x["chosen_lengths"],
    "dpop": lambda c, j, b, x: sp(-b * (c - j - x["lam"] * max(0, -c))),
    "r_dpo": lambda c, j, b, x: sp(-(b * (c - j) + x["alpha"] * (x["chosen_lengths"]
                                                                 - x["rejected_lengths"]))),
    "tdpo1": lambda c, j, b, x: sp(-b * (c - j - x["rejected_kl"] + x["chosen_kl"])),
    "tdpo2": lambda c, j, b, x: sp(-b * (c - j - x["alpha"] * (x["rejected_kl"]
                                                               - x["chosen_kl"]))),
    "chi_po": lambda c, j, b, x: sp(-max(-2 * x["r_max"],
                                         min(2 * x["r_max"], b * (phi(c) - phi(j))))),
    "exo_pair": lambda c, j, b, x: (
        s(b * (c - j)) * math.log(s(b * (c - j)) / (1 - x["label_smoothing"]))
        + s(b * (j - c)) * math.log(s(b * (j - c)) / x["label_smoothing"])),
    "discopop": lambda c, j, b, x: (
        (1 - s(b * (c - j) / x["tau"])) * sp(-b * (c - j))
        + s(b * (c - j) / x["tau"]) * math.exp(-b * (c - j))),
    "sigmoid_norm": lambda c, j, b, x: sp(-b * (c / x["chosen_lengths"]
                                                - j / x["rejected_lengths"])),
    "nca_pair": lambda c, j, b, x: sp(-b * c) + sp(b * c) / 2 + sp(b * j) / 2,
    "bco_pair": lambda c, j, b, x: sp(x["delta"] - b * c) + sp(b * j - x["delta"]),
    "sppo_hard": lambda c, j, b, x: (c - 1 / (2 * b)) ** 2 + (j + 1 / (2 * b)) ** 2,
    "cal_dpo": lambda c, j, b, x: sp(j - c) + x["weight"] * ((c - 1 / (2 * b)) ** 2
                                                             + (j + 1 / (2 * b)) ** 2),
    "apo_zero": lambda c, j, b, x: 1 - s(b * c) + s(b * j),
    "apo_down": lambda c, j, b, x: s(b * c) + 1 - s(b * (c - j)),
    "kto": lambda c, j, b, x: (x["desirable_weight"] * (1 - s(b * (c - x["kl"])))
                               + x["undesirable_weight"] * (1 - s(b * (x["kl"] - j)))),
    "pro": lambda c, j, b, x: (sp(b * (j - c)) + (sp(b * c) + sp(-b * c)) / 2
                               + (sp(b * j) + sp(-b * j)) / 2),
    "slic_hf": lambda c, j, b, x: (max(0, x["delta"] - b * (x["chosen"] - x["rejected"]))
                                   - x["lam"] * x["chosen"]),
    "cpo": lambda c, j, b, x: (sp(-b * (x["chosen"] - x["rejected"]))
                               - x["alpha"] * x["chosen"] / x["chosen_lengths"]),
    "simpo": lambda c, j, b, x: sp(x["gamma"] - b * (x["chosen"] / x["chosen_lengths"]
                                                     - x["rejected"] / x["rejected_lengths"])),
    "orpo": lambda c, j, b, x: (
        -x["chosen"] / x["chosen_lengths"]
        + b * sp(logit(math.exp(x["rejected"] / x["rejected_lengths"]))
                 - logit(math.exp(x["chosen"] / x["chosen_lengths"])))),
    "ra": lambda c, j, b, x: ((b * c + b * x["log_z"] - x["chosen_true"]) ** 2
                              + (b * j + b * x["log_z"] - x["rejected_true"]) ** 2) / 2,
    "rda": lambda c, j, b, x: (b * (c - j) - x["chosen_true"] + x["rejected_true"]) ** 2,
    "pra": lambda c, j, b, x: (x["preference"] * sp(-b * (c - j))
                               + (1 - x["preference"]) * sp(b * (c - j))),
}
# Other values than the defaults, so that a value that is written into the code shows.
CHOSEN_HERE = {"alpha": .7, "lam": 1.3, "tau": .5, "r_max": 3.0, "label_smoothing": .1,
               "delta": .4, "weight": .8, "gamma": .3, "desirable_weight": 1.3,
               "undesirable_weight": .6, "kl": .25}


def example(name, n=20):
    """(four log-probabilities (n,), further arguments) for a loss, at random."""
    every = CHOSEN_HERE | {
        "chosen_lengths": torch.randint(1, 9, (n,)).double(),
        "rejected_lengths": torch.randint(1, 9, (n,)).double(),
        "chosen_kl": torch.rand(n, dtype=torch.float64),
        "rejected_kl": torch.rand(n, dtype=torch.float64),
        "chosen_true": torch.randn(n, dtype=torch.float64),
        "rejected_true": torch.randn(n, dtype=torch.float64),
        "log_z": torch.randn(n, dtype=torch.float64),
        "preference": torch.rand(n, dtype=torch.float64),
    }
    logps = list(-4 * torch.rand(4, n, dtype=torch.float64) - .1)
    return logps, {argument: every[argument] for argument in LEAGUE[name][1]}


def pair(i, logps, further):
    """Pair i of an example, as an example of one pair."""
    one = {}
    for name, value in further.items():
        one[name] = value[i:i + 1] if torch.is_tensor(value) else value
    return [x[i:i + 1] for x in logps], one


@pytest.mark.parametrize("beta", [0.3, 1.7])
@pytest.mark.parametrize("name", BY_HAND)
def test_every_loss_is_its_formula_on_random_pairs(name, beta):
    """20 random pairs, each computed alone in plain floats, to 1e-12. No further argument has its
    default, so a number that is written into the code shows."""
    logps, further = example(name)
    want = []
    for i in range(20):
        one, options = pair(i, logps, further)
        chosen, rejected, ref_chosen, ref_rejected = (x.item() for x in one)
        x = {"chosen": chosen, "rejected": rejected}
        for argument, value in options.items():
            x[argument] = value.item() if torch.is_tensor(value) else value
        want.append(BY_HAND[name](chosen - ref_chosen, rejected - ref_rejected, beta, x))
    assert_same(loss_of(name, *logps, beta=beta, **further), vector(*want), 1e-12,
                what=f"the {name} loss. Does the code hold a number that is an argument")


def test_aot_sorts_both_margins_of_the_batch():
    """AOT on 20 random pairs, compared with Python's sorted(), to 1e-12. The order of the pairs,
    and which reference belongs to which pair, change nothing."""
    (pc, pr, rc, rr), _ = example("aot")
    got = loss_of("aot", pc, pr, rc, rr, beta=0.7)
    margins, ref_margins = sorted((pc - pr).tolist()), sorted((rc - rr).tolist())
    want = [sp(-0.7 * (m - r)) for m, r in zip(margins, ref_margins)]
    assert_same(got, vector(*want), 1e-12, {
        "the margins are not sorted: this is DPO": softplus(-0.7 * ((pc - pr) - (rc - rr))),
        "log-ratios are sorted; this is AOT for unpaired data":
            softplus(-0.7 * ((pc - rc).sort().values - (pr - rr).sort().values)),
    }, what="the aot loss")
    mixed, ref_mixed = torch.randperm(20), torch.randperm(20)
    assert_same(loss_of("aot", pc[mixed], pr[mixed], rc[ref_mixed], rr[ref_mixed], beta=0.7), got,
                1e-12, what="the aot loss of a shuffled batch")


# ---- Gradients, batches, precision

@pytest.mark.parametrize("beta", [0.3, 1.7])
@pytest.mark.parametrize("name", LEAGUE)
def test_gradients_are_central_differences(name, beta):
    """The gradient at both log-probabilities, by autograd, is that of central differences, to 1e-7.
    It is not zero: every loss trains the chosen response."""
    (chosen, rejected, *ref), further = example(name)
    chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()

    def loss():
        return loss_of(name, chosen, rejected, *ref, beta=beta, **further).sum()

    got = torch.autograd.grad(loss(), [chosen, rejected])
    for side, slope, x in zip(("chosen", "rejected"), got, (chosen, rejected)):
        assert_same(slope, dpo.central_differences(loss, x), 1e-7,
                    {"the gradient is zero. Is something detached?": torch.zeros_like(slope)},
                    what=f"the gradient of the {name} loss at log pi of the {side} response")
    assert got[0].abs().max() > 1e-3, f"the {name} loss does not train the chosen response"


@pytest.mark.parametrize("name", [n for n in LEAGUE if n != "aot"])
def test_a_pair_has_the_same_loss_alone(name):
    """Batch invariance: each pair of 20, and the pair alone, to 1e-12. AOT is left out, because it
    sorts over the batch."""
    logps, further = example(name)
    together = loss_of(name, *logps, beta=0.3, **further)
    for i in range(20):
        one, options = pair(i, logps, further)
        assert_same(loss_of(name, *one, beta=0.3, **options), together[i:i + 1], 1e-12,
                    what=f"the {name} loss of a pair alone. Does it depend on the other pairs")


@pytest.mark.parametrize("name", [n for n in LEAGUE if n != "chi_po"])
def test_losses_and_gradients_are_finite_at_wide_margins(name):
    """Log-ratios of +-1000 in float32. The logarithm of a sigmoid that is 0 would be infinite, and
    0 times infinity is nan. Chi-squared PO is left out, because e^1000 is too large."""
    logps = [torch.tensor([-500., -1500.]), torch.tensor([-1500., -500.]),
             torch.tensor([-1500., -500.]), torch.tensor([-500., -1500.])]
    _, further = example(name, 2)
    chosen, rejected = logps[0].requires_grad_(), logps[1].requires_grad_()
    further = {k: v.float() if torch.is_tensor(v) else v for k, v in further.items()}
    got = loss_of(name, *logps, beta=1.0, **further)
    slopes = torch.autograd.grad(got.sum(), [chosen, rejected])
    assert got.dtype == torch.float32, f"{name}: the losses are {got.dtype}"
    for what, values in zip(("loss", "chosen slope", "rejected slope"), (got, *slopes)):
        assert values.isfinite().all(), f"{name}: the {what} is {values.tolist()}"


# ---- What is detached, and what is ignored

@pytest.mark.parametrize("name, argument, flows", [
    ("kto", "kl", False), ("bco_pair", "delta", False), ("tdpo2", "chosen_kl", False),
    ("tdpo2", "rejected_kl", True), ("tdpo1", "chosen_kl", True), ("tdpo1", "rejected_kl", True)])
def test_what_is_detached_gets_no_gradient(name, argument, flows):
    """KTO's kl, BCO's delta and TDPO2's D_w are constants to the gradient. The other D of TDPO
    train the policy: their gradient is that of central differences, to 1e-7."""
    logps, further = example(name, 4)
    x = torch.as_tensor(further[argument], dtype=torch.float64).clone().requires_grad_()
    logps[0].requires_grad_()

    def loss():
        return loss_of(name, *logps, beta=0.7, **further | {argument: x}).sum()

    slope = torch.autograd.grad(loss(), x, allow_unused=True)[0]
    if flows:
        assert slope is not None, f"{argument} of {name} is detached; it trains the policy"
        assert_same(slope, dpo.central_differences(loss, x), 1e-7, what=f"dL/d{argument}")
    else:
        assert slope is None or not slope.any(), f"{argument} of {name} must be detached"


WITHOUT_REFERENCE = ["slic_hf", "cpo", "simpo", "orpo"]


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_losses_without_a_reference_ignore_it(name):
    """Another reference gives the same losses, to the bit."""
    logps, further = example(name)
    other = [*logps[:2], logps[2] - 1, logps[3] + 2]
    assert torch.equal(loss_of(name, *logps, beta=0.3, **further),
                       loss_of(name, *other, beta=0.3, **further)), f"{name} has no reference"


@pytest.mark.parametrize("name", [n for n in LEAGUE if n not in WITHOUT_REFERENCE])
def test_all_other_losses_depend_on_the_reference(name):
    """Chosen responses that the reference likes less have other losses. Without the reference it
    would be another method."""
    logps, further = example(name)
    other = [*logps[:2], logps[2] - 1, logps[3]]
    difference = (loss_of(name, *logps, beta=0.3, **further)
                  - loss_of(name, *other, beta=0.3, **further)).abs().max()
    assert difference > 1e-3, f"{name} ignores the reference"


# ---- What is refused

@pytest.mark.parametrize("name", LEAGUE)
def test_beta_and_shapes_are_checked(name):
    """As dpo.dpo_loss does: beta must be positive, and the four log-probabilities have one shape.
    The message names the value. A beta of 0.1 is the default."""
    logps, further = example(name, 3)
    for beta in (0.0, -0.1, math.nan):
        assert f"beta={beta}" in assert_refused(LEAGUE[name][0], *logps, beta=beta, **further)
    column = [logps[0][:, None], *logps[1:]]
    assert "(3, 1)" in assert_refused(LEAGUE[name][0], *column, beta=0.1, **further)
    assert_same(loss_of(name, *logps, **further), loss_of(name, *logps, beta=0.1, **further), 0,
                what=f"the {name} loss without a beta")


@pytest.mark.parametrize("name", [n for n in LEAGUE if None in LEAGUE[n][1].values()])
def test_what_the_batch_brings_has_one_number_for_each_pair(name):
    """A tensor of shape (B,1) would broadcast to (B,B) pairs that do not exist. A length of 0 would
    divide by 0."""
    logps, further = example(name, 3)
    for argument, default in LEAGUE[name][1].items():
        if default is None and argument != "kl":
            wrong = further | {argument: further[argument][:, None]}
            message = assert_refused(LEAGUE[name][0], *logps, **wrong)
            assert argument in message and "(3, 1)" in message and "(3,)" in message, message
        if argument.endswith("lengths"):
            wrong = further | {argument: vector(4, 0, 2)}
            message = assert_refused(LEAGUE[name][0], *logps, **wrong)
            assert f"{argument} holds 0" in message, message


@pytest.mark.parametrize("name, argument", [("kto", "kl"), ("bco_pair", "delta")])
def test_one_number_for_the_batch_is_a_scalar(name, argument):
    """A tensor of shape (B,1) would broadcast to (B,B) losses. A number and a scalar tensor give
    the same."""
    logps, further = example(name, 3)
    message = assert_refused(LEAGUE[name][0], *logps, **further | {argument: vector(1, 2, 3)})
    assert f"{argument} (3,)" in message, message
    as_tensor = further | {argument: vector(further[argument])[0]}
    assert_same(loss_of(name, *logps, **as_tensor), loss_of(name, *logps, **further), 0,
                what=f"the {name} loss with {argument} as a tensor")


@pytest.mark.parametrize("name, argument, values", [
    ("exo_pair", "label_smoothing", (0, 0.5, -0.1, math.nan)),
    ("chi_po", "r_max", (0, -1, math.nan)),
    ("pra", "preference", (vector(.5, 1.5, 0), vector(.5, math.nan, 0)))])
def test_values_outside_their_range_are_refused(name, argument, values):
    """EXO's label smoothing is in (0, 0.5), the largest reward is positive, and probabilities are
    in [0, 1]. The message names the value."""
    logps, further = example(name, 3)
    for value in values:
        message = assert_refused(LEAGUE[name][0], *logps, **further | {argument: value})
        shown = value.tolist() if torch.is_tensor(value) else value
        assert f"{argument}={shown}" in message, message


# ---- The league

def test_every_loss_of_the_file_is_in_the_league():
    """Each function whose name ends in _loss stands there under its name, with what it takes after
    beta. None stands for what the batch must bring: it has no default in the function either."""
    functions = {}
    for name, function in inspect.getmembers(more_losses, inspect.isfunction):
        if name.endswith("_loss") and function.__module__ == more_losses.__name__:
            functions[name.removesuffix("_loss")] = function
    assert {name: loss for name, (loss, _) in LEAGUE.items()} == functions
    in_the_file = sorted(functions, key=lambda name: functions[name].__code__.co_firstlineno)
    assert list(LEAGUE) == in_the_file, "the league has the order of the file"
    for name, (loss, further) in LEAGUE.items():
        parameters = list(inspect.signature(loss).parameters.values())
        assert [p.name for p in parameters[:5]] == [
            "chosen", "rejected", "ref_chosen", "ref_rejected", "beta"], name
        assert [p.name for p in parameters[5:]] == list(further), name
        for p in parameters[5:]:
            assert p.kind == p.KEYWORD_ONLY, f"{p.name} of {name} must be given by name"
            assert further[p.name] == (None if p.default is p.empty else p.default), name
            assert p.default is not None, f"{name}: None means that there is no default"


def test_a_trainer_can_loop_over_the_league():
    """One batch brings everything. Every entry gives one loss for each pair, (B,), and no two give
    the same losses."""
    batch = {}
    for name in LEAGUE:
        logps, further = example(name)
        batch |= {k: v for k, v in further.items() if k not in batch}
    results = {}
    for name, (loss, further) in LEAGUE.items():
        options = {k: batch[k] if default is None else default for k, default in further.items()}
        results[name] = loss(*logps, beta=0.3, **options)
        assert torch.is_tensor(results[name]) and results[name].shape == (20,), (
            f"{name} must return the loss of each pair, (B,), and nothing else")
    names = list(results)
    for i, name in enumerate(names):
        for other in names[:i]:
            difference = (results[name] - results[other]).abs().max()
            assert difference > 1e-4, f"{name} and {other} give the same losses"


# ---- Equalities between losses, to 1e-12

ONES = {"chosen_lengths": torch.ones(20, dtype=torch.float64),
        "rejected_lengths": torch.ones(20, dtype=torch.float64)}
ZEROS = {"chosen_kl": torch.zeros(20, dtype=torch.float64),
         "rejected_kl": torch.zeros(20, dtype=torch.float64)}
TWOS = {"chosen_kl": ZEROS["chosen_kl"] + 2, "rejected_kl": ZEROS["rejected_kl"] + 2}


@pytest.mark.parametrize("name, further", [
    ("pra", {"preference": ONES["chosen_lengths"]}),
    ("rpo", {"alpha": 0, "chosen_lengths": ONES["chosen_lengths"]}),
    ("r_dpo", ONES | {"alpha": 0}),
    ("r_dpo", ONES | {"alpha": 0.7}),
    ("dpop", {"lam": 0}),
    ("tdpo1", ZEROS), ("tdpo1", TWOS), ("tdpo2", ZEROS), ("tdpo2", TWOS),
    ("sigmoid_norm", ONES),
])
def test_these_losses_become_dpo(name, further):
    """PRA with sure labels, RPO, R-DPO and DPOP without their weight, R-DPO and sigmoid_norm with
    equal lengths, TDPO with equal D."""
    logps, _ = example(name)
    assert_same(loss_of(name, *logps, beta=0.3, **further), dpo.dpo_loss(*logps, beta=0.3)[0],
                1e-12, what=f"the {name} loss")


def test_dpop_is_dpo_where_the_chosen_response_has_gained():
    """Where log pi(y_w) > log ref(y_w), the losses and both slopes are those of DPO, to 1e-12.
    Elsewhere the loss is larger."""
    logps, _ = example("dpop")
    logps[0].requires_grad_(), logps[1].requires_grad_()
    of_dpop, of_dpo = loss_of("dpop", *logps, beta=0.3), dpo.dpo_loss(*logps, beta=0.3)[0]
    gained = logps[0] > logps[2]
    assert 0 < gained.sum() < 20
    assert_same(of_dpop[gained], of_dpo[gained], 1e-12, what="the DPOP loss")
    for x in logps[:2]:
        slopes = [torch.autograd.grad(loss.sum(), x, retain_graph=True)[0][gained]
                  for loss in (of_dpop, of_dpo)]
        assert_same(*slopes, 1e-12, what="a slope of DPOP")
    assert (of_dpop > of_dpo)[~gained].all(), "the penalty must make the loss larger"


def test_other_equalities():
    """Each line of the table is an equality of two losses, to 1e-12."""
    logps, _ = example("pro")
    pc, pr, rc, rr = logps
    zero, ones = torch.zeros(20, dtype=torch.float64), ONES["chosen_lengths"]
    true = {"chosen_true": zero + 0.5, "rejected_true": zero}
    dpo_one = dpo.dpo_loss(*logps, beta=1.0)[0]
    sppo = loss_of("sppo_hard", *logps, beta=0.3)
    table = {
        "CPO without likelihood is DPO with a uniform reference":
            (loss_of("cpo", *logps, beta=0.3, alpha=0, chosen_lengths=ones),
             dpo.dpo_loss(pc, pr, zero - 5, zero - 5, beta=0.3)[0]),
        "SimPO without gamma on texts of one token is CPO without likelihood":
            (loss_of("simpo", *logps, beta=0.3, gamma=0, **ONES),
             loss_of("cpo", *logps, beta=0.3, alpha=0, chosen_lengths=ones)),
        "SLiC-HF without likelihood is RSO's hinge with a uniform reference":
            (loss_of("slic_hf", *logps, beta=0.3, lam=0),
             losses.hinge_loss(pc, pr, zero, zero, beta=0.3)[0]),
        "KTO with kl = 0 is APO-zero":
            (loss_of("kto", *logps, beta=0.3, kl=0), loss_of("apo_zero", *logps, beta=0.3)),
        "Cal-DPO is DPO at beta = 1, plus half of SPPO":
            (loss_of("cal_dpo", *logps, beta=0.3), dpo_one + sppo / 2),
        "RDA with a difference of 1/2 is beta^2 times IPO":
            (loss_of("rda", *logps, beta=0.3, **true),
             0.3 ** 2 * losses.ipo_loss(*logps, beta=0.3)[0]),
        "PRA with probability 1 - eps is cDPO":
            (loss_of("pra", *logps, beta=0.3, preference=ones * 0.8),
             losses.cdpo_loss(*logps, beta=0.3, label_smoothing=0.2)[0]),
        "PRA with probability 0 is DPO with the responses exchanged":
            (loss_of("pra", *logps, beta=0.3, preference=zero),
             dpo.dpo_loss(pr, pc, rr, rc, beta=0.3)[0]),
        "AOT of one pair is DPO":
            (loss_of("aot", *(x[:1] for x in logps), beta=0.3),
             dpo.dpo_loss(*(x[:1] for x in logps), beta=0.3)[0]),
    }
    for equality, (one, other) in table.items():
        assert_same(one, other, 1e-12, what=equality)


def test_ktos_kl_is_the_mean_log_ratio_and_at_least_zero():
    """log-ratios 1 and 2 have the mean 1.5. A negative mean becomes 0: no KL is negative. It
    carries no gradient."""
    policy = vector(-3, -2).requires_grad_()
    assert_same(more_losses.kto_kl(policy, vector(-4, -4)), vector(1.5)[0], 1e-12, {
        "this is the sum; wanted the mean": vector(3.0)[0],
        "the sign is flipped, and then cut off at 0": vector(0.0)[0]}, what="kl")
    assert more_losses.kto_kl(policy, vector(-1, -1)) == 0
    assert not more_losses.kto_kl(policy, vector(-4, -4)).requires_grad, "kl must be detached"


# ---- BMC

def token_example():
    """(logits (4,6,5), tokens, response_mask, changed), two chosen and two rejected texts."""
    logits = torch.randn(4, 6, 5, dtype=torch.float64)
    tokens = torch.randint(5, (4, 6))
    mask = torch.arange(6).expand(4, 6) >= 2
    changed = mask & (torch.rand(4, 6) < .5)
    changed[:, 4] = True
    return logits, tokens, mask, changed


def test_bmc_without_changed_tokens_is_dpo():
    """All weights are 1: the sums are dpo.response_logps, and the losses DPO's, to 1e-12. A delta
    of 0 gives the same."""
    logits, tokens, mask, changed = token_example()
    token_logps = dpo.token_logps(logits, tokens)
    want = dpo.response_logps(logits, tokens, mask)
    ref = list(-5 * torch.rand(2, 2, dtype=torch.float64))
    for marked, delta in ((torch.zeros_like(changed), 2.0), (changed, 0.0)):
        got = more_losses.bmc_logps(token_logps, mask[:, 1:], marked[:, 1:], delta)
        assert_same(got, want, 1e-12, {"the average of the tokens": want / 4}, what="the sums")
        assert_same(dpo.dpo_loss(*got.chunk(2), *ref, beta=0.3)[0],
                    dpo.dpo_loss(*want.chunk(2), *ref, beta=0.3)[0], 1e-12, what="the DPO losses")


def test_bmc_weighs_the_changed_tokens_and_detaches_the_weights():
    """The sums in plain floats, to 1e-12, and their gradient: it is the weights, because those are
    detached. Tokens with 1/pi above and below delta are among them."""
    logits, tokens, mask, changed = token_example()
    token_logps = dpo.token_logps(logits, tokens)  # (4, 5)
    token_logps[0, 3], token_logps[1, 3] = -0.1, -4.0  # both changed
    token_logps.requires_grad_()
    mask, changed = mask[:, 1:], changed[:, 1:]
    weights = torch.zeros(4, 5, dtype=torch.float64)
    want, kinds = [0.0] * 4, set()
    for b in range(4):
        for t in range(5):
            if mask[b, t]:
                inverse = math.exp(-token_logps[b, t].item())
                kinds |= {inverse > 3} if changed[b, t] else set()
                weights[b, t] = 1 + (min(inverse, 3) if changed[b, t] else 0)
                want[b] += weights[b, t].item() * token_logps[b, t].item()
    assert kinds == {True, False}, "the example needs weights on both sides of delta"
    got = more_losses.bmc_logps(token_logps, mask, changed, delta=3)
    plain = (token_logps * mask).sum(-1).detach()
    assert_same(got.detach(), vector(*want), 1e-12, {
        "changed tokens have the weight min(1/pi, delta); the 1 + is missing":
            vector(*want) - (token_logps * changed).sum(-1).detach(),
        "no token is weighed": plain}, what="the weighted sums")
    assert_same(more_losses.bmc_logps(token_logps, mask, changed),
                more_losses.bmc_logps(token_logps, mask, changed, delta=2), 0,
                what="the sums without a delta, which is 2 then")
    slope = torch.autograd.grad(got.sum(), token_logps)[0]
    assert_same(slope, weights, 1e-12,
                {"the weights are not detached": weights - changed.double()}, what="the gradient")


def test_bmc_refuses_masks_of_another_shape():
    """The message names the mask and both shapes."""
    token_logps, mask = torch.randn(2, 3), torch.ones(2, 3)
    message = assert_refused(more_losses.bmc_logps, token_logps, mask[:, :1], mask)
    assert "response_mask (2, 1)" in message and "(2, 3)" in message
    assert "changed (2, 1)" in assert_refused(more_losses.bmc_logps, token_logps, mask, mask[:, :1])


# ---- Minimisers. The expected loss over all pairs and labels of a world of a few responses is
# written out by lab.tabular, and LBFGS looks for its minimum.

def random_mu(n):
    """A distribution that pairs are drawn from, other than the reference. (n,)"""
    return torch.softmax(torch.randn(n, dtype=torch.float64), 0)


def of_pairs(values):
    """Values of n responses, for the n*n pairs of lab.tabular.pair_losses: (n*n,), (n*n,)."""
    n = len(values)
    return values.repeat_interleave(n), values.repeat(n)


def expected_loss(name, logps, ref, labels, beta, mu, **further):
    """The expected loss of pairs whose responses are two samples of mu, a scalar. labels (n,n):
    labels[i, j] is the probability that i is preferred to j."""
    def loss(*four, beta):
        return (loss_of(name, *four, beta=beta, **further),)  # tabular takes the first of a tuple
    return tabular.population_loss(logps, ref, labels, beta, drawn=mu[:, None] * mu, loss=loss)


def best_policy(name, ref, labels, beta, mu, **further):
    """The log-probabilities of the policy with the least expected loss. (n,)"""
    def loss(theta):
        return expected_loss(name, torch.log_softmax(theta, 0), ref, labels, beta, mu,
                             **further)
    return torch.log_softmax(tabular.minimise(loss, ref), 0)


def best_log_ratios(name, ref, labels, beta, mu, **further):
    """The log(pi/ref) with the least expected loss, whether or not such a policy sums to 1. (n,)"""
    def loss(theta):
        return expected_loss(name, theta, ref, labels, beta, mu, **further)
    return tabular.minimise(loss, ref) - ref


def summing_to_one(weights_of):
    """The logarithm of weights_of(z) (n,), for the z at which they sum to 1. z is found by
    bisection; the sum falls as z rises."""
    low, high = -1e3, 1e3
    for _ in range(200):
        z = (low + high) / 2
        low, high = (z, high) if weights_of(z).sum() > 1 else (low, z)
    return weights_of(z).log()


def assert_same_policy(found, want, what, tolerance=1e-6):
    """Both (n,): log-probabilities. The total variation between them is compared with 0."""
    assert found.isfinite().all(), f"{what}: LBFGS found {found.tolist()}"
    distance = tabular.total_variation(found, want).item()
    assert distance < tolerance, f"{what}: {distance:.2g} in total variation from the closed form"


@pytest.mark.parametrize("name", ["ra", "rda", "pra"])
@pytest.mark.parametrize("beta", [0.5, 1.5])
def test_the_losses_of_udrra_end_at_pi_star(name, beta):
    """From rewards, from differences of rewards and from probabilities of preferences: the best
    policy is pi*, Eq. 4 of the DPO paper, to a total variation of 1e-6. RA, which knows Z, finds
    it without being told that a policy sums to 1."""
    ref, reward = tabular.random_world(5)
    preference, mu = tabular.preferences(reward), random_mu(5)
    true, other_true = of_pairs(reward)
    further = {"chosen_true": true, "rejected_true": other_true, "preference": preference.flatten(),
               "log_z": world.log_partition(ref, reward, beta).expand(25)}
    further = {k: further[k] for k in LEAGUE[name][1]}
    star = world.optimal_policy(ref, reward, beta)
    found = best_policy(name, ref, preference, beta, mu, **further)
    assert_same_policy(found, star, f"the minimiser of {name}")
    if name == "ra":
        free = best_log_ratios(name, ref, preference, beta, mu, **further)
        assert_same(free, star - ref, 1e-6, what="RA's log-ratios, free")


@pytest.mark.parametrize("alpha", [0.3, -0.2])
def test_r_dpo_ends_where_a_token_costs_alpha(alpha):
    """R-DPO's minimiser is pi* of the reward r - alpha |y|, to a total variation of 1e-6."""
    ref, reward = tabular.random_world(5)
    lengths = vector(2, 7, 4, 9, 3)
    of_chosen, of_rejected = of_pairs(lengths)
    found = best_policy("r_dpo", ref, tabular.preferences(reward), 0.7, random_mu(5),
                        chosen_lengths=of_chosen, rejected_lengths=of_rejected, alpha=alpha)
    want = world.optimal_policy(ref, reward - alpha * lengths, 0.7)
    assert_same_policy(found, want, "R-DPO's minimiser. Is the sign of the length term right?")


def test_chi_po_ends_at_the_optimum_with_a_chi_squared_leash():
    """Chi-squared PO: phi(log(pi/ref)) differs between two responses by the difference of their
    rewards over beta (1e-6). The policy is what LBFGS finds where it maximises
    E[r] - beta (KL + chi^2/2), to a total variation of 1e-6, and it is not pi*."""
    ref, reward = tabular.random_world(4)
    beta = 0.8
    found = best_policy("chi_po", ref, tabular.preferences(reward), beta, random_mu(4))
    link = (found - ref).exp() + (found - ref)
    assert_same(link - link[0], (reward - reward[0]) / beta, 1e-6, what="the differences of phi")

    def minus_objective(theta):
        logps = torch.log_softmax(theta, 0)
        chi_squared = (logps.exp() ** 2 / ref.exp()).sum() - 1
        return -(tabular.objective(logps, ref, reward, beta) - beta * chi_squared / 2)

    want = torch.log_softmax(tabular.minimise(minus_objective, ref), 0)
    assert_same_policy(found, want, "chi-squared PO's minimiser")
    star = world.optimal_policy(ref, reward, beta)
    assert tabular.total_variation(found, star) > 1e-3, "it must not be DPO's pi*"


@pytest.mark.parametrize("eps", [0.01, 0.2])
def test_exo_fits_the_preference_and_not_its_log_odds(eps):
    """EXO with two responses: beta h = (2p - 1) log((1 - eps)/eps), to 1e-6."""
    ref, reward = tabular.random_world(2)
    preference = tabular.preferences(reward)
    found = best_policy("exo_pair", ref, preference, 0.6, random_mu(2), label_smoothing=eps)
    h = (found[0] - found[1]) - (ref[0] - ref[1])
    p = preference[0, 1]
    assert_same(0.6 * h, (2 * p - 1) * math.log((1 - eps) / eps), 1e-6,
                {"this is the log-odds of the preference: DPO's": reward[0] - reward[1]},
                what="beta h")


def test_nca_fits_twice_the_win_rate():
    """NCA: beta log(pi/ref) = log(2 q), free, to 1e-6. q is the win rate against a sample of mu.
    With beta = 1 and pairs from the reference this is a policy: the likeliest on the chosen
    responses, 2 ref q, to a total variation of 1e-6."""
    ref, reward = tabular.random_world(5)
    preference, mu = tabular.preferences(reward), random_mu(5)
    found = best_log_ratios("nca_pair", ref, preference, 0.5, mu)
    assert_same(0.5 * found, (2 * (preference * mu).sum(-1)).log(), 1e-6, what="beta log(pi/ref)")
    found = best_policy("nca_pair", ref, preference, 1.0, ref.exp())
    assert_same_policy(found, tabular.preferred_ft(ref, preference), "NCA's best policy")


def test_bco_fits_the_log_odds_of_the_win_rate():
    """BCO: beta log(pi/ref) = delta + logit q, free, to 1e-6."""
    ref, reward = tabular.random_world(5)
    preference, mu = tabular.preferences(reward), random_mu(5)
    q = (preference * mu).sum(-1)
    for delta in (0.0, 0.4):
        found = best_log_ratios("bco_pair", ref, preference, 0.5, mu, delta=delta)
        assert_same(0.5 * found, delta + torch.logit(q), 1e-6,
                    {"delta has the wrong sign": torch.logit(q) - delta},
                    what=f"beta log(pi/ref) with delta = {delta}")


def test_sppo_fits_the_win_rate():
    """SPPO with hard labels: log(pi/ref) = (q - 1/2)/beta, free, to 1e-6."""
    ref, reward = tabular.random_world(5)
    preference, mu = tabular.preferences(reward), random_mu(5)
    found = best_log_ratios("sppo_hard", ref, preference, 0.5, mu)
    assert_same(found, ((preference * mu).sum(-1) - .5) / .5, 1e-6, what="log(pi/ref)")


def test_length_normalised_losses_weigh_the_reward_with_the_length():
    """sigmoid_norm ends at ref exp(|y| (r - z)/beta), SimPO without gamma at exp(|y| (r - z)/beta)
    and CPO without likelihood at exp(r/beta), each with the z that makes it a policy. To a total
    variation of 1e-6. None of them is pi*."""
    ref, reward = tabular.random_world(4)
    preference, mu = tabular.preferences(reward), random_mu(4)
    beta, lengths = 0.9, vector(1, 3, 2, 4)
    of_chosen, of_rejected = of_pairs(lengths)
    both = {"chosen_lengths": of_chosen, "rejected_lengths": of_rejected}
    star = world.optimal_policy(ref, reward, beta)
    for name, further, want in (
        ("sigmoid_norm", both,
         summing_to_one(lambda z: (ref + lengths * (reward - z) / beta).exp())),
        ("simpo", both | {"gamma": 0},
         summing_to_one(lambda z: (lengths * (reward - z) / beta).exp())),
        ("cpo", {"chosen_lengths": of_chosen, "alpha": 0}, torch.log_softmax(reward / beta, 0)),
    ):
        found = best_policy(name, ref, preference, beta, mu, **further)
        assert_same_policy(found, want, f"the minimiser of {name}")
        assert tabular.total_variation(found, star) > 1e-3, f"{name} must not end at pi*"


def slopes_at(name, logps, ref, labels, beta, mu, **further):
    """The gradient of the expected loss at log-probabilities, (n,)."""
    logps = logps.clone().requires_grad_()
    loss = expected_loss(name, logps, ref, labels, beta, mu, **further)
    return torch.autograd.grad(loss, logps)[0]


def test_losses_linear_in_sigma_have_no_minimiser():
    """APO-zero and KTO. The slope of the expected loss is 2 mu beta sigma' (u (1 - q) - d q) at any
    log-ratio, to 1e-12, with the weights d and u. It never changes its sign on the way. So a
    log-ratio goes to plus or minus infinity."""
    ref, reward = tabular.random_world(5)
    preference, mu, beta = tabular.preferences(reward), random_mu(5), 0.7
    q = (preference * mu).sum(-1)
    for far in (0.0, 1.0, 4.0):
        logps = ref + far * torch.randn(5, dtype=torch.float64)
        for name, kl, d, u, further in (
            ("apo_zero", 0, 1, 1, {}),
            ("kto", .3, 1.5, .8,
             {"kl": .3, "desirable_weight": 1.5, "undesirable_weight": .8})):
            bent = sigma(beta * (logps - ref - kl)) * sigma(-beta * (logps - ref - kl))
            want = 2 * mu * beta * bent * (u * (1 - q) - d * q)
            assert_same(slopes_at(name, logps, ref, preference, beta, mu, **further), want, 1e-12,
                        what=f"the slope of the expected {name} loss")


def test_pro_stops_at_a_finite_level_for_sure_labels():
    """Two responses, and the first is always preferred. DPO would go on for ever. PRO stops where
    t = e^(beta w) solves t^3 = t^2 + t + 3, with the opposite log-ratio for the other response:
    then its two slopes cancel. With labels that say nothing it stays at the reference. 1e-6."""
    ref = torch.log_softmax(torch.randn(2, dtype=torch.float64), 0)
    beta = 0.6
    t = 2.0
    for _ in range(50):
        t -= (t ** 3 - t ** 2 - t - 3) / (3 * t ** 2 - 2 * t - 1)  # Newton
    drawn = vector(0, .5, .5, 0).view(2, 2)  # the two are never compared with themselves

    def expected(preference):
        def loss(*four, beta):
            return (loss_of("pro", *four, beta=beta),)
        return lambda theta: tabular.population_loss(theta, ref, preference, beta, drawn=drawn,
                                                     loss=loss)

    sure, nothing = vector(.5, 1, 0, .5).view(2, 2), torch.full((2, 2), .5, dtype=torch.float64)
    found = tabular.minimise(expected(sure), ref) - ref
    assert_same(beta * found, vector(math.log(t), -math.log(t)), 1e-6, what="beta log(pi/ref)")
    start = ref + vector(.5, .7)
    found = tabular.minimise(expected(nothing), start) - ref
    assert_same(found, vector(0, 0), 1e-6, what="log(pi/ref) of labels that say nothing")


@pytest.mark.parametrize("name", ["rpo", "cal_dpo"])
def test_what_these_add_to_dpo_moves_the_optimum(name):
    """At pi* the slope of the expected DPO loss is 0 (1e-12). That of RPO and of Cal-DPO is not,
    also among policies that sum to 1. So their minimiser is not pi*."""
    ref, reward = tabular.random_world(5)
    preference, mu, beta = tabular.preferences(reward), random_mu(5), 1.0
    star = world.optimal_policy(ref, reward, beta)
    further = {"chosen_lengths": of_pairs(vector(2, 7, 4, 9, 3))[0]} if name == "rpo" else {}

    def along_policies(slope):
        """The part of the gradient that log_softmax lets through."""
        return slope - star.exp() * slope.sum()

    of_dpo = slopes_at("pra", star, ref, preference, beta, mu,
                       preference=torch.ones(25, dtype=torch.float64))
    assert_same(along_policies(of_dpo), torch.zeros(5, dtype=torch.float64), 1e-12,
                what="the slope of DPO at pi*")
    moved = along_policies(slopes_at(name, star, ref, preference, beta, mu, **further))
    assert moved.abs().max() > 1e-3, f"{name} would end at pi*"
