"""Variants of the DPO loss, by name in LOSSES, and two measures of what DPO does not see.

Each is called as dpo.dpo_loss is, and returns losses, chosen_rewards and rejected_rewards, each
(B,). Two also take label_smoothing. h is dpo.preference_logits, sigma the logistic function.
"""
import torch
import torch.nn.functional as F

from dpo import dpo_loss, implicit_rewards, preference_logits


def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    """Conservative DPO: -(1 - eps) log sigma(beta h) - eps log sigma(-beta h).

    eps = label_smoothing is the share of labels that are believed to be flipped. The loss stops
    at beta h = log((1 - eps)/eps). https://ericmitchell.ai/cdpo.pdf, Eq. 3.
    Raises ValueError for label_smoothing outside [0, 0.5).
    """
    check_label_smoothing(label_smoothing)
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    logits = preference_logits(*logps)  # (B,)
    losses = (-(1 - label_smoothing) * F.logsigmoid(beta * logits)
              - label_smoothing * F.logsigmoid(-beta * logits))  # (B,)
    return losses, *implicit_rewards(*logps, beta)


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    """Robust DPO: [-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps).

    Its mean over labels, of which the share eps = label_smoothing is flipped, is the DPO loss on
    clean labels: it is unbiased. https://arxiv.org/abs/2403.00409.
    Raises ValueError for label_smoothing outside [0, 0.5).
    """
    check_label_smoothing(label_smoothing)
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    logits = preference_logits(*logps)  # (B,)
    losses = (-(1 - label_smoothing) * F.logsigmoid(beta * logits)
              + label_smoothing * F.logsigmoid(-beta * logits)) / (1 - 2 * label_smoothing)
    return losses, *implicit_rewards(*logps, beta)


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """IPO: (h - 1/(2 beta))^2, a margin to reach instead of a margin to grow.

    beta is the tau of the paper: a smaller tau asks for a larger margin, 1/(2 tau).
    Log-probabilities are summed here. IPO's authors later averaged them over tokens; pass
    `response_logps(..., average=True)` for that. https://arxiv.org/abs/2310.12036, Eq. 17.
    """
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    rewards = implicit_rewards(*logps, beta)  # first, since it refuses a beta of 0
    losses = (preference_logits(*logps) - 1 / (2 * beta)) ** 2  # (B,)
    return losses, *rewards


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """RSO's hinge: max(0, 1 - beta h). It stops at the margin 1/beta.

    It is called hinge-norm in https://arxiv.org/abs/2309.06657, and beta is the gamma of that
    paper. The hinge of SLiC-HF, https://arxiv.org/abs/2305.10425, has no log-ratio to a reference.
    """
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    losses = torch.relu(1 - beta * preference_logits(*logps))  # (B,)
    return losses, *implicit_rewards(*logps, beta)


LOSSES = {"sigmoid": dpo_loss, "cdpo": cdpo_loss, "robust": robust_loss,
          "ipo": ipo_loss, "hinge": hinge_loss}
SMOOTHED = {"cdpo", "robust"}  # the losses that take label_smoothing


def check_label_smoothing(label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 0.5): "
                         "it is the share of flipped labels")


# ---- What Eq. 7 does not see: mass that goes to text that is in no pair. Eq. 7 fixes only the
# differences of rewards, so log pi(y_w|x) and log pi(y_l|x) may fall together.

def missing_mass(policy_logps, ref_logps):
    """An estimate of the probability that the policy spends on text the reference does not write.

    Eq. 9 says sum_y ref(y|x) exp(r^(x,y)/beta) = sum_y pi(y|x) = 1. Over the text that the
    reference writes, the sum is E_{y ~ ref}[pi(y|x)/ref(y|x)], the policy's mass on that text.
    1 minus it went elsewhere.

    policy_logps, ref_logps (B,): of responses drawn from the reference, chosen and rejected.
    Returns a scalar. For such responses it is unbiased, and its expectation is least, 0, for pi*
    too. For responses that others wrote it is biased. Its variance grows as exp(KL), and so it is
    a poor term of a loss where beta is small.
    """
    return 1 - (policy_logps - ref_logps).exp().mean()


LIKELY = 0.01  # with 0.001 it sees less of the leak, with 0.03 it costs reward


def stray_mass(logits, likely):
    """The policy's probability of those next tokens that are unlikely under the reference. (N,)

    Text that is in no pair leaves the pairs at some token. So this looks at every beginning of the
    pairs' responses, N of them. logits (N,V): the policy's. likely (N,V): true for the tokens to
    which the reference gives at least `LIKELY`. It is never more than 1, and of pi* it is about as
    small as of the reference. It does not matter who wrote the responses.
    """
    return torch.where(likely, 0.0, logits.softmax(-1)).sum(-1)  # (N,)
