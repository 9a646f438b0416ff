"""DPO in log space: logsumexp, logaddexp, softplus."""
import math

import torch
import torch.nn.functional as F


def _at_least_float32(*xs):
    dtype = torch.float32
    for x in xs:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in xs)


def _need_same_shape(**named):
    first, *others = (x.shape for x in named.values())
    if any(s != first for s in others):
        raise ValueError(", ".join(f"{k}: {list(v.shape)}" for k, v in named.items()))


def _need_beta(beta):
    if not beta > 0:
        raise ValueError(f"beta={beta}, but it must be positive")


def _need_smoothing(label_smoothing):
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}, but 0 <= label_smoothing < 0.5")


def _softplus(x):
    # torch switches to the identity at 20, which costs 2e-9; at 40 nothing is lost in float64
    return F.softplus(x, threshold=40)


def token_logps(logits, tokens):
    if logits.ndim != 3 or logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits: {list(logits.shape)}, tokens: {list(tokens.shape)}")
    logits, = _at_least_float32(logits[:, :-1])
    target = torch.take_along_dim(logits, tokens[:, 1:, None].long(), dim=-1).squeeze(-1)
    return target - torch.logsumexp(logits, dim=-1)


def response_logps(logits, tokens, response_mask, average=False):
    if logits.ndim != 3 or logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits: {list(logits.shape)}, tokens: {list(tokens.shape)}")
    _need_same_shape(tokens=tokens, response_mask=response_mask)
    keep = response_mask[:, 1:] != 0
    drop = F.pad(~keep, (0, 1), value=True)
    logps = token_logps(logits.masked_fill(drop.unsqueeze(-1), 0.0), tokens)
    total = torch.where(keep, logps, torch.zeros_like(logps)).sum(-1)
    return total / keep.sum(-1).clamp_min(1) if average else total


def sequence_logps(policy, tokens, response_mask):
    _need_same_shape(tokens=tokens, response_mask=response_mask)
    keep = response_mask[:, 1:] != 0
    logits, = _at_least_float32(policy.head(policy.hidden(tokens)[:, :-1][keep]))
    target = logits.gather(-1, tokens[:, 1:][keep].long().unsqueeze(-1)).squeeze(-1)
    logps = target - logits.logsumexp(-1)
    return logps.new_zeros(keep.shape).masked_scatter(keep, logps).sum(-1)


def pair_logps(policy, batch):
    logits = policy(batch["tokens"])
    return response_logps(logits, batch["tokens"], batch["response_mask"]).chunk(2)


def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    _need_same_shape(policy_chosen=policy_chosen_logps, policy_rejected=policy_rejected_logps,
                     ref_chosen=ref_chosen_logps, ref_rejected=ref_rejected_logps)
    pc, pr, rc, rr = _at_least_float32(policy_chosen_logps, policy_rejected_logps,
                                       ref_chosen_logps, ref_rejected_logps)
    return (pc - rc) - (pr - rr)


@torch.no_grad()
def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    _need_beta(beta)
    _need_same_shape(policy_chosen=policy_chosen_logps, policy_rejected=policy_rejected_logps,
                     ref_chosen=ref_chosen_logps, ref_rejected=ref_rejected_logps)
    pc, pr, rc, rr = _at_least_float32(policy_chosen_logps, policy_rejected_logps,
                                       ref_chosen_logps, ref_rejected_logps)
    return beta * (pc - rc), beta * (pr - rr)


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    args = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = implicit_rewards(*args, beta)
    z = beta * preference_logits(*args)
    return torch.logaddexp(torch.zeros_like(z), -z), chosen, rejected


def gradient_weight(chosen_rewards, rejected_rewards):
    _need_same_shape(chosen=chosen_rewards, rejected=rejected_rewards)
    margin = chosen_rewards - rejected_rewards
    return torch.exp(-torch.logaddexp(torch.zeros_like(margin), margin))


def analytic_gradient(policy, batch, beta):
    with torch.enable_grad():
        chosen, rejected = pair_logps(policy, batch)
    weight = gradient_weight(*implicit_rewards(chosen, rejected, batch["ref_chosen_logps"],
                                               batch["ref_rejected_logps"], beta))
    seed = (-beta / weight.numel() * weight).to(chosen.dtype)
    params = list(policy.parameters())
    live = [p for p in params if p.requires_grad]
    grads = iter(torch.autograd.grad((chosen, rejected), live, (seed, -seed),
                                     allow_unused=True, materialize_grads=True))
    return [next(grads) if p.requires_grad else torch.zeros_like(p) for p in params]


def _number(y):
    return y.item() if isinstance(y, torch.Tensor) else float(y)


def central_differences(f, x, eps=1e-5):
    grad = torch.empty_like(x, requires_grad=False)
    for index in torch.cartesian_prod(*map(torch.arange, x.shape)).reshape(x.numel(), x.dim()) \
            if x.dim() else torch.zeros(1, 0, dtype=torch.long):
        index = tuple(index.tolist())
        before = x.data[index].item()
        try:
            x.data[index] = before + eps
            above = _number(f())
            x.data[index] = before - eps
            below = _number(f())
        finally:
            x.data[index] = before
        grad[index] = (above - below) / (2 * eps)
    return grad


def gradient_check(policy, batch, beta):
    tokens, mask = batch["tokens"], batch["response_mask"]
    refs = batch["ref_chosen_logps"], batch["ref_rejected_logps"]

    def of_logps(pair):
        return dpo_loss(*pair, *refs, beta)[0].mean()

    def of_logits(logits):
        return of_logps(response_logps(logits, tokens, mask).chunk(2))

    def of_policy():
        return of_logps(pair_logps(policy, batch))

    logits = policy(tokens).detach().clone().requires_grad_()
    chosen, rejected = (x.detach().clone().requires_grad_()
                        for x in response_logps(logits, tokens, mask).chunk(2))
    weight = gradient_weight(*implicit_rewards(chosen, rejected, *refs, beta))
    to_chosen = -beta * weight / len(weight)

    logp_of_all = logits.detach() - logits.detach().logsumexp(-1, keepdim=True)
    to_token = torch.zeros_like(logp_of_all)
    to_token[:, :-1].scatter_(-1, tokens[:, 1:, None].long(), 1.0)
    to_logits = to_token - logp_of_all.exp()
    to_logits[:, -1] = 0
    to_logits[:, :-1][mask[:, 1:] == 0] = 0
    to_logits = to_logits * torch.cat([to_chosen, -to_chosen])[:, None, None]

    work = [("log pi(y_w|x)", chosen, to_chosen, lambda: of_logps((chosen, rejected))),
            ("log pi(y_l|x)", rejected, -to_chosen, lambda: of_logps((chosen, rejected))),
            ("logits", logits, to_logits, lambda: of_logits(logits))]
    work += [(name, p, g, of_policy) for (name, p), g
             in zip(policy.named_parameters(), analytic_gradient(policy, batch, beta))]
    for name, x, analytic, f in work:
        auto, = torch.autograd.grad(f(), x, allow_unused=True, materialize_grads=True)
        numeric = central_differences(f, x)
        yield (name, x.shape, float((analytic - auto).abs().max()),
               float((analytic - numeric).abs().max()), float(analytic.abs().max()))


def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    # softplus(z) = softplus(-z) + z, so the two terms are one softplus and a straight line
    _need_smoothing(label_smoothing)
    args = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = implicit_rewards(*args, beta)
    z = beta * preference_logits(*args)
    return _softplus(-z) + label_smoothing * z, chosen, rejected


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _need_smoothing(label_smoothing)
    args = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = implicit_rewards(*args, beta)
    z = beta * preference_logits(*args)
    return _softplus(-z) - label_smoothing / (1 - 2 * label_smoothing) * z, chosen, rejected


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    args = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = implicit_rewards(*args, beta)
    return (preference_logits(*args) - 0.5 / beta).square(), chosen, rejected


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    args = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = implicit_rewards(*args, beta)
    slack = 1 - beta * preference_logits(*args)
    return torch.maximum(slack, torch.zeros_like(slack)), chosen, rejected


def missing_mass(policy_logps, ref_logps):
    _need_same_shape(policy=policy_logps, ref=ref_logps)
    policy_logps, ref_logps = _at_least_float32(policy_logps, ref_logps)
    ratio = policy_logps - ref_logps
    return -torch.expm1(torch.logsumexp(ratio, dim=0) - math.log(len(ratio)))
