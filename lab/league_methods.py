"""The methods of lab.league, the settings that each is tuned over, and the conditions.

The target is pi* for beta = 1. A setting is good where the minimiser of the loss is near this
target, so a loss with another minimiser needs another beta. In the comments, r is the true reward,
and q is the probability that a response is preferred to a random one. Over the pairs, q rises with
r by about 0.19 for each unit of reward in the middle, where q = 1/2. w is log(pi/ref), and h is the
w of the chosen response minus that of the rejected one. For pi*, w = r + const.
"""
from typing import Callable, NamedTuple

from dpo import dpo_loss
from lab import more_losses as more
from losses import cdpo_loss, hinge_loss, ipo_loss, robust_loss
from rlhf import Settings


class Method(NamedTuple):
    title: str
    kind: str  # a key of KINDS
    loss: Callable | None  # None: a reward model and policy learning
    grid: list  # three settings, dicts; the learning rate is LR where they name none


KINDS = {"difference": "only the difference of two log-ratios",
         "added": "the difference, and one more term", "levels": "each log-ratio by itself",
         "alone": "without a reference", "samples": "new samples, or a moving reference"}
LR = 1.5e-3  # that of train.py
SAMPLES = Settings.samples  # responses that PPO and REINFORCE++ generate


def grid(*settings):
    return [{"lr": LR} | setting for setting in settings]


def betas(*values, **other):
    return grid(*({"beta": value} | other for value in values))


METHODS = {
    # Its minimiser is pi* at beta = 1. What is left to choose is the learning rate.
    "dpo": Method("DPO", "difference", dpo_loss,
                  grid(*({"beta": 1.0, "lr": lr} for lr in (7.5e-4, 1.5e-3, 3e-3)))),
    # In the middle its log-odds are 1 - 2 eps times the true ones. A beta that is smaller by this
    # factor makes up for it.
    "cdpo": Method("cDPO", "difference", cdpo_loss, grid(
        {"beta": 1.0, "label_smoothing": 0.05}, {"beta": 0.9, "label_smoothing": 0.05},
        {"beta": 0.8, "label_smoothing": 0.1})),
    # Labels of the plain condition are not flipped. So a smaller eps should be the better one.
    "robust": Method("robust DPO", "difference", robust_loss, grid(
        {"beta": 1.0, "label_smoothing": 0.01}, {"beta": 1.0, "label_smoothing": 0.05},
        {"beta": 1.2, "label_smoothing": 0.05})),
    # Minimiser: w = q/beta + const. This is r in the middle for beta = 0.19. Far from the middle q
    # rises more slowly than r, so a smaller beta may be better.
    "ipo": Method("IPO", "difference", ipo_loss, betas(0.1, 0.15, 0.2)),
    # It stops at the margin 1/beta, for sure pairs and for unsure ones alike. For pi* a margin is a
    # difference of rewards. beta = 0.5 gave a KL of 1.6 instead of 0.9, in one trial.
    "hinge": Method("hinge (RSO)", "difference", hinge_loss, betas(0.7, 1.0, 1.4)),
    # It asks for a margin of 1 between log-probabilities. The likelihood of the chosen response,
    # times lam, is all that ties it to the data.
    "slic_hf": Method("SLiC-HF", "alone", more.slic_hf_loss,
                      betas(1.0, lam=0.03) + betas(1.0, lam=0.1) + betas(1.0, lam=0.3)),
    # The likelihood of a token draws to the chosen responses, which are worse than those of pi*.
    "rpo": Method("RPO", "added", more.rpo_loss,
                  betas(1.0, alpha=0.1) + betas(1.0, alpha=0.3) + betas(1.0, alpha=1.0)),
    # Of the best policy, the chosen response is often less likely than of the reference: where both
    # responses are poor. The penalty forbids it. With lam = 5 the policy hardly left the reference,
    # in one trial; lam is 50 in re-implementations.
    "dpop": Method("DPOP", "added", more.dpop_loss,
                   betas(1.0, lam=0.1) + betas(1.0, lam=0.3) + betas(1.0, lam=1.0)),
    # Minimiser: |y| (r - z)/beta is the log-probability, without a reference. A text has about ten
    # tokens, so 10 is the beta that does not exaggerate the rewards. But it forgets how often the
    # reference writes each text, and 20 was worse than 10, in one trial. gamma asks for a margin.
    "simpo": Method("SimPO", "alone", more.simpo_loss, grid(
        {"beta": 5.0, "gamma": 0.0}, {"beta": 10.0, "gamma": 0.0}, {"beta": 10.0, "gamma": 1.0})),
    # beta is the weight of the odds beside the likelihood. Both are means over tokens.
    "orpo": Method("ORPO", "alone", more.orpo_loss, betas(1.0, 2.0, 4.0)),
    # Minimiser without the likelihood: exp(r/beta), whatever the reference writes.
    "cpo": Method("CPO", "alone", more.cpo_loss,
                  betas(0.3, alpha=1.0) + betas(0.5, alpha=1.0) + betas(1.0, alpha=1.0)),
    # Without a minimiser: only the steps and the rate say how far it goes. With a large beta sigma
    # is soon flat, and what has gone too far stays there: 2 was worse than 1, in one trial.
    "kto": Method("KTO", "levels", more.kto_loss, betas(0.25, 0.5, 1.0)),
    # Minimiser: a token costs alpha. Nothing favours long text in the plain condition, so that a
    # small alpha should be the best.
    "r_dpo": Method("R-DPO", "difference", more.r_dpo_loss,
                    betas(1.0, alpha=0.01) + betas(1.0, alpha=0.03) + betas(1.0, alpha=0.1)),
    # alpha is the weight of the divergence of the rejected text, minus that of the chosen one. It
    # holds the policy back, so that a larger alpha needs a smaller beta.
    "tdpo2": Method("TDPO2", "added", more.tdpo2_loss,
                    betas(1.0, alpha=0.1) + betas(0.6, alpha=0.5) + betas(0.4, alpha=0.5)),
    # e^w + w = r/beta + const. In the middle, where w = 0, a small change of w counts twice, and
    # beta = 0.5 is right. Where probability leaks out of the text of the pairs, every w falls. Then
    # e^w vanishes, and what is left is DPO with this beta: 0.25 gave a KL of 4, in one trial.
    "chi_po": Method("chi-PO", "difference", more.chi_po_loss, betas(0.7, 1.0, 1.4)),
    # For two responses beta h = tanh((difference of r)/2) log((1-eps)/eps), eps = label_smoothing.
    # In the middle this is the difference of r where beta is half of the logarithm: 3.5, 1.5 and
    # 1.1 for eps = 0.001, 0.05 and 0.1. A smaller beta makes up for the tanh. The published eps,
    # 0.001, asks for beta h up to 7. There sigma is flat, and a policy that goes too far does not
    # come back: beta = 2.5 and 3.5 gave twice the KL of pi* and more, in two trials.
    "exo_pair": Method("EXO", "difference", more.exo_pair_loss, grid(
        {"beta": 3.5, "label_smoothing": 0.001}, {"beta": 1.2, "label_smoothing": 0.05},
        {"beta": 0.8, "label_smoothing": 0.1})),
    # beta w = log(2q): in the middle 0.38 r, for q = 1 at most 0.69. So it is too flat where r is
    # large, and a beta below 0.38 makes up for some of it.
    "nca_pair": Method("NCA", "levels", more.nca_pair_loss, betas(0.15, 0.2, 0.3)),
    # w = (q - 1/2)/beta, the log-ratios of IPO but for a constant. A policy with these levels would
    # sum to more than 1. So the large ones give way, and beta must be smaller than IPO's: with 0.15
    # the KL was half of that of pi*, in one trial, and with 0.09 three quarters.
    "sppo_hard": Method("SPPO", "levels", more.sppo_hard_loss, betas(0.05, 0.07, 0.1)),
    # It stands between DPO with beta = 1 and SPPO with this beta.
    "cal_dpo": Method("Cal-DPO", "levels", more.cal_dpo_loss, betas(0.04, 0.06, 0.1)),
    # beta w = logit q + const, and in the middle logit q = 0.75 r. beta = 0.75 gave a KL of 0.65
    # instead of 0.9, in one trial.
    "bco_pair": Method("BCO", "levels", more.bco_pair_loss, betas(0.45, 0.55, 0.75)),
    # Without a minimiser, as KTO. It is KTO where KTO's kl is 0.
    "apo_zero": Method("APO-zero", "levels", more.apo_zero_loss, betas(0.25, 0.5, 1.0)),
    # Near 0 its second term is beta^2 (w^2 + l^2)/8. It draws every log-ratio to 0. beta = 0.6 gave
    # a KL of 0.2 instead of 0.9, in one trial.
    "pro": Method("PRO", "levels", more.pro_loss, betas(0.2, 0.3, 0.4)),
    # For two responses, where v = beta h is positive: exp(2v)/(1 + exp(v)) is the odds of the
    # preference. Far from 0 this v is the difference of r, as in DPO. Before that it is a little
    # more, and near 0 it is pushed away from 0. So beta should be 1 or a little more.
    "discopop": Method("DiscoPOP", "difference", more.discopop_loss, betas(0.8, 1.0, 1.3)),
    # The margins of a batch are sorted. So it is about their distribution, and not about each pair.
    # beta = 1 gave a KL of 1.6 instead of 0.9, in one trial.
    "aot": Method("AOT", "difference", more.aot_loss, betas(1.0, 1.5, 2.5)),
    # w = |y| (r - z)/beta. A text has about ten tokens.
    "sigmoid_norm": Method("sigmoid_norm", "difference", more.sigmoid_norm_loss,
                           betas(7.0, 10.0, 14.0)),
    # A changed token counts 1 + min(1/pi, 2), and most tokens of a pair are changed. So a log-ratio
    # counts two or three times.
    "bmc": Method("BMC, its weights", "difference", dpo_loss,
                  betas(0.25, bmc=2.0) + betas(0.35, bmc=2.0) + betas(0.5, bmc=2.0)),
    # The default run of train.py, which has the weight 1.
    "stray": Method("DPO + stray mass", "added", dpo_loss,
                    betas(1.0, stray_weight=0.3) + betas(1.0, stray_weight=1.0)
                    + betas(1.0, stray_weight=3.0)),
    # A former default, with the weight 0.15. The estimate of the mass is noisy.
    "missing": Method("DPO + missing mass", "added", dpo_loss,
                      betas(1.0, norm_weight=0.05) + betas(1.0, norm_weight=0.15)
                      + betas(1.0, norm_weight=0.3)),
    # New pairs from the policy: as many labels in all. The minimiser stays pi* at beta = 1.
    "online": Method("online DPO", "samples", dpo_loss, grid(
        {"beta": 1.0, "rounds": 5}, {"beta": 1.0, "rounds": 25},
        {"beta": 1.0, "rounds": 25, "lr": 7.5e-4})),
    # If the reference becomes the policy k times, each stretch tilts it by r/beta. The k + 1
    # stretches together give pi* where beta = k + 1. With mix m this is beta = 1 + k m, about.
    "tr_dpo": Method("TR-DPO", "samples", dpo_loss, grid(
        {"beta": 2.0, "moves": 1, "mix": 1.0}, {"beta": 4.0, "moves": 3, "mix": 1.0},
        {"beta": 2.8, "moves": 3, "mix": 0.6})),
    # The learning rate decides most, in the trials for rlhf.Settings.
    "ppo": Method("PPO", "samples", None, [{"lr": 1e-3}, {"lr": 2e-3}, {"lr": 3e-3}]),
    "reinforce": Method("REINFORCE++", "samples", None,
                        [{"lr": lr, "critic": False} for lr in (1e-3, 2e-3, 3e-3)]),
}

CONDITIONS = {"plain": "the run's own labels", "flip-10": "10% of the labels are flipped",
              "flip-20": "20% of the labels are flipped", "few": "2,500 pairs, as many steps",
              "deterministic": "the better response always wins",
              "length": "an annotator who likes long text; J is by the true reward"}
# The other conditions are for these methods, so that all of it takes about two hours. They are
# those that are said to bear flipped labels, sure labels, few labels, or a taste for long text.
EVERYWHERE = ("dpo", "cdpo", "robust", "ipo", "hinge", "exo_pair", "chi_po", "r_dpo",
              "sigmoid_norm", "simpo", "kto", "sppo_hard", "pro", "stray", "missing", "online",
              "ppo")
FLIPPED = {"flip-10": 0.1, "flip-20": 0.2}
FEW = 2500
# Some methods are made for a condition. They are told what they need to know.
TOLD = {"flip-10": {"robust": {"beta": 1.0, "label_smoothing": 0.1}},
        "flip-20": {"robust": {"beta": 1.0, "label_smoothing": 0.2}},
        # the annotator adds 0.5 for a word, and a word more is a token more
        "length": {"r_dpo": {"alpha": 0.5}}}
