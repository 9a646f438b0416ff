"""More preference losses, each a pure function of log-probabilities.

Each is called as dpo.dpo_loss is, and returns the losses alone, (B,). What a loss needs besides
comes by name. LEAGUE holds them all. DPO stands in dpo.py; cDPO, robust DPO, IPO and RSO's hinge
stand in losses.py.

chosen, rejected          (B,)  log pi(y_w|x) and log pi(y_l|x), sums over response tokens
ref_chosen, ref_rejected  (B,)  the same of the reference: constants, no loss trains it
w, l                      (B,)  log(pi/ref) of the chosen and of the rejected response; h = w - l
chosen_lengths, rejected_lengths  (B,)  numbers of response tokens, |y_w| and |y_l|

Minimiser: where the expected loss over all pairs and labels is least. Both responses come from one
distribution mu, and the labels are Bradley-Terry's with the true reward r. q is the probability
that y is preferred to a sample of mu. "Free": the log-ratios need not belong to a policy that sums
to 1. tests/test_more_losses.py finds each of them again. Where none is named, no formula is known.

tests/test_more_losses_trl.py executes TRL 1.16.0 beside these functions. The numbers of equations
are those that TRL's comments name. Where a docstring names no equation, no TRL and no trainer, the
formula comes from notes about the paper. The paper itself was not read.
"""
import inspect
import math

import torch
import torch.nn.functional as F

from dpo import implicit_rewards, preference_logits


def log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta):
    """w and l, (B,) each. Raises ValueError unless beta > 0, and for shapes that differ."""
    preference_logits(chosen, rejected, ref_chosen, ref_rejected)  # refuses shapes that differ
    implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)  # refuses such a beta
    return chosen - ref_chosen, rejected - ref_rejected


def check_shapes(logps, **given):
    """Raises ValueError for a tensor of another shape than logps, and for a length below 1."""
    for name, values in given.items():
        if values.shape != logps.shape:
            raise ValueError(f"{name} {tuple(values.shape)} must have the shape "
                             f"{tuple(logps.shape)} of the log-probabilities")
        if name.endswith("lengths") and not (values >= 1).all():
            raise ValueError(f"{name} holds {values.min().item()}: a response has at least 1 token")


def constant(name, value, logps):
    """A number for the whole batch, detached. Raises ValueError for a tensor that is no scalar."""
    value = torch.as_tensor(value, dtype=logps.dtype).detach()
    if value.dim():
        raise ValueError(f"{name} {tuple(value.shape)} must be a number: the batch has one")
    return value


def per_token(chosen, rejected, chosen_lengths, rejected_lengths):
    """Sums over tokens become means over tokens. (B,), (B,)"""
    check_shapes(chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    return chosen / chosen_lengths, rejected / rejected_lengths


# ---- DPO with something added

def rpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, chosen_lengths, alpha=1.0):
    """Iterative RPO: -log sigma(beta h) - alpha log pi(y_w)/|y_w|. With alpha = 0 it is DPO.
    The second term moves the minimiser away from pi*. https://arxiv.org/abs/2404.19733. TRL's term
    `sft` averages over all tokens of the batch; here each response counts the same."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    check_shapes(chosen, chosen_lengths=chosen_lengths)
    return -F.logsigmoid(beta * (w - l)) - alpha * chosen / chosen_lengths  # (B,)


def dpop_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, lam=50.0):
    """DPO-Positive: -log sigma(beta (h - lam max(0, -w))). With lam = 0 it is DPO.
    The penalty is there where the chosen response is less likely than under the reference.
    Elsewhere this is DPO. https://arxiv.org/abs/2402.13228, as re-implementations have it."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    return -F.logsigmoid(beta * (w - l - lam * torch.relu(-w)))  # (B,)


def r_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *,
               chosen_lengths, rejected_lengths, alpha=0.01):
    """R-DPO: -log sigma(beta h + alpha (|y_w| - |y_l|)). With alpha = 0 it is DPO.
    A token costs alpha. Minimiser: ref exp((r - alpha |y|)/beta), made to sum to 1.
    https://arxiv.org/abs/2403.19159. The default of alpha is this project's."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    check_shapes(chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    return -F.logsigmoid(beta * (w - l) + alpha * (chosen_lengths - rejected_lengths))  # (B,)


def tdpo1_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, chosen_kl, rejected_kl):
    """TDPO1: -log sigma(beta (h - (D_l - D_w))), D_w = chosen_kl and D_l = rejected_kl, (B,).
    D is the sum over response positions of KL(ref||pi) over the vocabulary. Nothing is detached:
    D trains the policy too. https://arxiv.org/abs/2404.11999, as in its authors' trainer."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    check_shapes(chosen, chosen_kl=chosen_kl, rejected_kl=rejected_kl)
    return -F.logsigmoid(beta * (w - l - (rejected_kl - chosen_kl)))  # (B,)


def tdpo2_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *,
               chosen_kl, rejected_kl, alpha=0.5):
    """TDPO2: -log sigma(beta (h - alpha (D_l - D_w))), D as in TDPO1. D_w is detached, D_l is not.
    https://arxiv.org/abs/2404.11999, as in its authors' trainer."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    check_shapes(chosen, chosen_kl=chosen_kl, rejected_kl=rejected_kl)
    return -F.logsigmoid(beta * (w - l - alpha * (rejected_kl - chosen_kl.detach())))  # (B,)


# ---- Another function of the log-ratios

def chi_po_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, r_max=math.inf):
    """Chi-squared PO: -log sigma(clip(beta (phi(w) - phi(l)), +-2 r_max)), phi(w) = e^w + w.
    Where it clips, the gradient is 0. Minimiser without clipping: phi(log(pi/ref)) = r/beta +
    const. It maximises E[r] - beta (KL(pi||ref) + chi^2(pi||ref)/2).
    https://arxiv.org/abs/2407.13399. In float32 e^w overflows from w = 88 on."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    if not r_max > 0:
        raise ValueError(f"r_max={r_max} must be positive: no reward is larger")
    margin = beta * ((w.exp() + w) - (l.exp() + l))  # (B,)
    return -F.logsigmoid(margin.clamp(-2 * r_max, 2 * r_max))  # (B,)


def exo_pair_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, label_smoothing=1e-3):
    """EXO for pairs: KL([s, 1-s] || [1-eps, eps]), s = sigma(beta h), eps = label_smoothing.
    Minimiser for two responses: beta h = (2p - 1) log((1-eps)/eps), with the preference p.
    https://arxiv.org/abs/2402.00856, Eq. 16. The authors' trainer has log-targets 0 and -10."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    if not 0 < label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be in (0, 0.5): take 0.001")
    right, wrong = F.logsigmoid(beta * (w - l)), F.logsigmoid(beta * (l - w))  # log s, log(1-s)
    return (right.exp() * (right - math.log1p(-label_smoothing))
            + wrong.exp() * (wrong - math.log(label_smoothing)))  # (B,)


def discopop_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, tau=0.05):
    """DiscoPOP: (1-m) (-log sigma(beta h)) + m exp(-beta h), m = sigma(beta h/tau), not detached.
    It is not convex. https://arxiv.org/abs/2406.08414, Eq. 5."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    margin = beta * (w - l)  # (B,)
    # m exp(-margin) as one exponential: as a product it becomes 0 times infinity, far below 0
    return (-F.logsigmoid(margin) * torch.sigmoid(-margin / tau)
            + (F.logsigmoid(margin / tau) - margin).exp())  # (B,)


def aot_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """AOT for pairs: -log sigma(beta (M_i - R_i)), M = chosen - rejected and R = ref_chosen -
    ref_rejected, each sorted over the batch. So loss i belongs to the i-th smallest margin, and
    not to pair i. The gradient passes the sorting. https://arxiv.org/abs/2406.05882, and TRL."""
    log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # for what it refuses
    margins = (chosen - rejected).sort(0).values  # (B,)
    return -F.logsigmoid(beta * (margins - (ref_chosen - ref_rejected).sort(0).values))  # (B,)


def sigmoid_norm_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *,
                      chosen_lengths, rejected_lengths):
    """TRL's sigmoid_norm: -log sigma(beta (w/|y_w| - l/|y_l|)). With lengths 1 it is DPO.
    Minimiser: ref exp(|y| (r - z)/beta). The number z makes it sum to 1."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    w, l = per_token(w, l, chosen_lengths, rejected_lengths)  # (B,), (B,)
    return -F.logsigmoid(beta * (w - l))  # (B,)


# ---- w and l are fitted, and not only their difference

def nca_pair_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """NCA for pairs: -log sigma(beta w) - log sigma(-beta w)/2 - log sigma(-beta l)/2.
    Minimiser, free: beta log(pi/ref) = log(2q). With beta = 1 and mu = ref it sums to 1.
    https://arxiv.org/abs/2402.05369, as in TRL and in its authors' trainer."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    return (-F.logsigmoid(beta * w) - 0.5 * F.logsigmoid(-beta * w)
            - 0.5 * F.logsigmoid(-beta * l))  # (B,)


def bco_pair_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, delta=0.0):
    """BCO for pairs: -log sigma(beta w - delta) - log sigma(-(beta l - delta)).
    delta, detached, is a running mean of all beta w and beta l. Minimiser, free: beta log(pi/ref)
    = delta + logit q. https://arxiv.org/abs/2404.04656, and TRL 0.23. TRL 1.16.0 has delta = 0."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    delta = constant("delta", delta, w)
    return -F.logsigmoid(beta * w - delta) - F.logsigmoid(delta - beta * l)  # (B,)


def sppo_hard_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """SPPO with hard labels: (w - 1/(2 beta))^2 + (l + 1/(2 beta))^2.
    Minimiser, free: log(pi/ref) = (q - 1/2)/beta. https://arxiv.org/abs/2405.00675, Eq. 4.7, as in
    TRL. The authors' trainer has half of it, and probabilities in the place of the labels."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    return (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2  # (B,)


def cal_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, weight=0.5):
    """Cal-DPO: -log sigma(h) + weight [(w - 1/(2 beta))^2 + (l + 1/(2 beta))^2].
    There is no beta inside sigma. Its minimiser is not pi*. https://arxiv.org/abs/2412.14516, as
    in its authors' trainer, weight included."""
    calibration = sppo_hard_loss(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,)
    h = preference_logits(chosen, rejected, ref_chosen, ref_rejected)  # (B,)
    return -F.logsigmoid(h) + weight * calibration  # (B,)


def apo_zero_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """APO-zero: 1 - sigma(beta w) + sigma(beta l). It pushes w up and l down.
    Minimiser: none. Free, log(pi/ref) goes to +infinity where q > 1/2, and to -infinity where
    q < 1/2. https://arxiv.org/abs/2408.06266, Eq. 7."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    return torch.sigmoid(-beta * w) + torch.sigmoid(beta * l)  # (B,)


def apo_down_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """APO-down: sigma(beta w) + 1 - sigma(beta h). https://arxiv.org/abs/2408.06266, Eq. 8.
    It is meant for chosen responses that are worse than the policy's: w shall fall, and l more."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    return torch.sigmoid(beta * w) + torch.sigmoid(beta * (l - w))  # (B,)


def kto_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *,
             kl, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO: d (1 - sigma(beta (w - kl))) + u (1 - sigma(beta (kl - l))), with the weights d and u.
    kl, from `kto_kl`, is detached. KTO needs no pairs: here a pair has the sum of two losses.
    Minimiser: none. Free, log(pi/ref) goes to +infinity where d q > u (1-q), else to -infinity.
    https://arxiv.org/abs/2402.01306, Eq. 7, as in TRL and in its authors' trainer."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    kl = constant("kl", kl, w)
    return (desirable_weight * torch.sigmoid(-beta * (w - kl))
            + undesirable_weight * torch.sigmoid(-beta * (kl - l)))  # (B,)


def kto_kl(policy_logps, ref_logps):
    """KTO's estimate of KL(pi||ref): the mean log-ratio, at least 0, detached. A scalar.
    policy_logps, ref_logps (B,): of mismatched pairs, such as prompt i with response i-1."""
    return (policy_logps - ref_logps).mean().clamp(min=0).detach()


def pro_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """PRO for pairs: -log sigma(beta h) - sum over v = beta w, beta l of log(sigma(v) sigma(-v))/2.
    The sum draws w and l to 0. So it fixes their level, and a sure label does not send h to
    infinity. https://arxiv.org/abs/2505.23316. Its formula could not be read: this is rebuilt from
    its text. Code for a successor, https://arxiv.org/abs/2606.05468, has the same formula."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    level = (F.logsigmoid(beta * w) + F.logsigmoid(-beta * w)
             + F.logsigmoid(beta * l) + F.logsigmoid(-beta * l))  # (B,)
    return -F.logsigmoid(beta * (w - l)) - 0.5 * level  # (B,)


# ---- Without a reference: these take it like the others, and ignore it

def slic_hf_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, delta=1.0, lam=0.1):
    """SLiC-HF: max(0, delta - beta (log pi(y_w) - log pi(y_l))) - lam log pi(y_w).
    The paper has beta = 1: https://arxiv.org/abs/2305.10425, with delta, lam and the second term
    as in the trainer of KTO's authors. TRL's hinge without a reference has beta, and lam = 0."""
    log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # for what it refuses
    return torch.relu(delta - beta * (chosen - rejected)) - lam * chosen  # (B,)


def cpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, chosen_lengths, alpha=1.0):
    """CPO: -log sigma(beta (log pi(y_w) - log pi(y_l))) - alpha log pi(y_w)/|y_w|.
    Minimiser for alpha = 0: exp(r/beta), made to sum to 1. https://arxiv.org/abs/2401.08417; the
    first term is Eq. 3. TRL and the authors' trainer average the second over the batch's tokens."""
    log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # for what it refuses
    check_shapes(chosen, chosen_lengths=chosen_lengths)
    return -F.logsigmoid(beta * (chosen - rejected)) - alpha * chosen / chosen_lengths  # (B,)


def simpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *,
               chosen_lengths, rejected_lengths, gamma=0.5):
    """SimPO: -log sigma(beta (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma).
    Minimiser for gamma = 0: exp(|y| (r - z)/beta). The number z makes it sum to 1.
    https://arxiv.org/abs/2405.14734. Its authors' trainer takes gamma/beta, and beta = 2."""
    log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # for what it refuses
    chosen, rejected = per_token(chosen, rejected, chosen_lengths, rejected_lengths)  # (B,), (B,)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)  # (B,)


def orpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *,
              chosen_lengths, rejected_lengths):
    """ORPO: -log p_w - beta log sigma(logit p_w - logit p_l), log p = log pi(y)/|y|.
    beta is the paper's lambda. https://arxiv.org/abs/2403.07691, Eq. 4 and 7. TRL averages the
    first term over prompt and response tokens of the batch. It has the second in float32."""
    log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # for what it refuses
    p_w, p_l = per_token(chosen, rejected, chosen_lengths, rejected_lengths)  # log p: (B,), (B,)
    log_odds = (p_w - p_l) - ((-p_w.expm1()).log() - (-p_l.expm1()).log())  # (B,)
    return -p_w - beta * F.logsigmoid(log_odds)  # (B,)


# ---- UDRRA, https://arxiv.org/abs/2502.03095: rewards, their differences, or preferences, and one
# target, pi*. Only its abstract could be read. The formulas are rebuilt from it.

def ra_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *,
            chosen_true, rejected_true, log_z):
    """RA: (beta log(pi/ref) + beta log Z - r)^2, the mean of both responses. Minimiser: pi*.
    chosen_true, rejected_true, log_z (B,): the true rewards, and log Z(x), as Eq. 4 of dpo.py."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    check_shapes(chosen, chosen_true=chosen_true, rejected_true=rejected_true, log_z=log_z)
    return ((beta * (w + log_z) - chosen_true) ** 2
            + (beta * (l + log_z) - rejected_true) ** 2) / 2  # (B,)


def rda_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, chosen_true, rejected_true):
    """RDA: (beta h - (r(y_w) - r(y_l)))^2, without Z. Minimiser: pi*."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    check_shapes(chosen, chosen_true=chosen_true, rejected_true=rejected_true)
    return (beta * (w - l) - (chosen_true - rejected_true)) ** 2  # (B,)


def pra_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, preference):
    """PRA: -P log sigma(beta h) - (1-P) log sigma(-beta h). With P = 1 it is DPO. Minimiser: pi*.
    preference (B,): P, the probability that y_w is preferred to y_l."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)  # (B,), (B,)
    check_shapes(chosen, preference=preference)
    if not ((preference >= 0) & (preference <= 1)).all():
        raise ValueError(f"preference={preference.tolist()} must be in [0, 1]: probabilities")
    margin = beta * (w - l)  # (B,)
    return -preference * F.logsigmoid(margin) - (1 - preference) * F.logsigmoid(-margin)  # (B,)


# ---- Other log-probabilities for DPO

def bmc_logps(token_logps, response_mask, changed, delta=2.0):
    """BMC: sum_t v_t log pi(y_t), v_t = 1 + changed_t min(1/pi(y_t), delta), v detached. (B,)
    token_logps, response_mask, changed (B,T), of either response. changed is true at tokens that an
    edit of one response into the other touches. The sums take the place of dpo.response_logps. The
    reference has weights of its own, as in the authors' trainer. https://arxiv.org/abs/2408.07471.
    """
    check_shapes(token_logps, response_mask=response_mask, changed=changed)
    v = bmc_weights(token_logps, changed, delta)  # (B, T)
    return torch.where(response_mask.bool(), v * token_logps, 0.0).sum(-1)  # (B,)


def bmc_weights(token_logps, changed, delta):
    """1 + min(1/pi, delta) where a token is changed, else 1. It carries no gradient. (...)"""
    return 1 + changed.bool() * (-token_logps.detach()).exp().clamp(max=delta)  # (...)


# ---- The league

def further_arguments(loss):
    """{name: default}: what a loss takes after beta. None: the batch must bring it."""
    spec = inspect.getfullargspec(loss)
    return {name: (spec.kwonlydefaults or {}).get(name) for name in spec.kwonlyargs}


# name -> (the function, its further arguments)
LEAGUE = {loss.__name__.removesuffix("_loss"): (loss, further_arguments(loss)) for loss in (
    rpo_loss, dpop_loss, r_dpo_loss, tdpo1_loss, tdpo2_loss, chi_po_loss, exo_pair_loss,
    discopop_loss, aot_loss, sigmoid_norm_loss, nca_pair_loss, bco_pair_loss, sppo_hard_loss,
    cal_dpo_loss, apo_zero_loss, apo_down_loss, kto_loss, pro_loss, slic_hf_loss, cpo_loss,
    simpo_loss, orpo_loss, ra_loss, rda_loss, pra_loss)}
