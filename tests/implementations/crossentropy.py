"""DPO from the losses that torch already has."""
import torch
import torch.nn.functional as F

IGNORE = -100


def _float(x):
    return x.float() if x.dtype in (torch.half, torch.bfloat16) else x


def _check_logits(logits, tokens):
    if logits.dim() != 3 or logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits of {tuple(logits.shape)} and tokens of {tuple(tokens.shape)}")


def _check_mask(tokens, response_mask):
    if response_mask.shape != tokens.shape:
        raise ValueError(f"a mask of {tuple(response_mask.shape)} for tokens of "
                         f"{tuple(tokens.shape)}")


def _check_pairs(*logps):
    shapes = [tuple(x.shape) for x in logps]
    if any(s != shapes[0] for s in shapes):
        raise ValueError(f"shapes differ: {shapes}")


def _check_beta(beta):
    if not beta > 0:
        raise ValueError(f"beta={beta}")


def _check_label_smoothing(label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}")


def token_logps(logits, tokens):
    _check_logits(logits, tokens)
    return -F.cross_entropy(_float(logits[:, :-1]).transpose(1, 2), tokens[:, 1:].long(),
                            reduction="none")


def response_logps(logits, tokens, response_mask, average=False):
    _check_logits(logits, tokens)
    _check_mask(tokens, response_mask)
    outside = ~response_mask[:, 1:].bool()
    target = tokens[:, 1:].long().masked_fill(outside, IGNORE).flatten()
    scores = _float(logits[:, :-1]).masked_fill(outside[..., None], 0.0).flatten(0, 1)
    nll = F.cross_entropy(scores, target, ignore_index=IGNORE, reduction="none")
    total = -nll.reshape(outside.shape).sum(dim=1)
    if average:
        total = total / (~outside).sum(dim=1).clamp(min=1)
    return total


def sequence_logps(policy, tokens, response_mask):
    _check_mask(tokens, response_mask)
    inside = response_mask[:, 1:].bool()
    states = policy.hidden(tokens)[:, :-1][inside]
    logps = -F.cross_entropy(_float(policy.head(states)), tokens[:, 1:][inside].long(),
                             reduction="none")
    pieces = logps.split(inside.sum(dim=1).tolist())
    return torch.stack([piece.sum() for piece in pieces])


def pair_logps(policy, batch):
    tokens = batch["tokens"]
    logps = response_logps(policy(tokens), tokens, batch["response_mask"])
    chosen, rejected = logps.split(len(tokens) // 2)
    return chosen, rejected


def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    _check_pairs(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return policy_chosen_logps - policy_rejected_logps - (ref_chosen_logps - ref_rejected_logps)


def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    _check_beta(beta)
    _check_pairs(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return ((policy_chosen_logps - ref_chosen_logps).detach() * beta,
            (policy_rejected_logps - ref_rejected_logps).detach() * beta)


def _bce(z, target):
    return F.binary_cross_entropy_with_logits(z, torch.full_like(z, target), reduction="none")


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    chosen_rewards, rejected_rewards = implicit_rewards(*logps, beta)
    return _bce(beta * preference_logits(*logps), 1.0), chosen_rewards, rejected_rewards


def gradient_weight(chosen_rewards, rejected_rewards):
    return torch.sigmoid(rejected_rewards - chosen_rewards)


def analytic_gradient(policy, batch, beta):
    chosen, rejected = pair_logps(policy, batch)
    rewards = implicit_rewards(chosen, rejected,
                               batch["ref_chosen_logps"], batch["ref_rejected_logps"], beta)
    weight = gradient_weight(*rewards)
    inner = beta * weight * (rejected - chosen)
    params = list(policy.parameters())
    live = [p for p in params if p.requires_grad]
    found = torch.autograd.grad(inner.mean(), live, allow_unused=True)
    found = {id(p): g for p, g in zip(live, found) if g is not None}
    return [found.get(id(p), torch.zeros_like(p)) for p in params]


def _number(x):
    return x.item() if torch.is_tensor(x) else x


def central_differences(f, x, eps=1e-5):
    grad = torch.zeros_like(x, requires_grad=False)
    for index in torch.ones_like(x, dtype=torch.bool, requires_grad=False).nonzero():
        index = tuple(index)
        old = x.data[index].clone()
        try:
            x.data[index] = old + eps
            plus = _number(f())
            x.data[index] = old - eps
            minus = _number(f())
        finally:
            x.data[index] = old
        grad[index] = (plus - minus) / (2 * eps)
    return grad


def gradient_check(policy, batch, beta):
    tokens, mask = batch["tokens"], batch["response_mask"]
    refs = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    B = len(tokens) // 2

    def loss(chosen, rejected):
        return dpo_loss(chosen, rejected, *refs, beta)[0].mean()

    logits = policy(tokens).detach().requires_grad_()
    chosen, rejected = (part.detach().clone().requires_grad_()
                        for part in response_logps(logits, tokens, mask).split(B))
    weight = gradient_weight(*implicit_rewards(chosen, rejected, *refs, beta))
    share = beta * weight / B

    # cross entropy's own gradient: softmax minus the target
    target = F.one_hot(tokens[:, 1:].long(), logits.shape[-1])
    nll_grad = (logits.detach()[:, :-1].softmax(-1) - target) * mask[:, 1:, None].bool()
    nll_grad = F.pad(nll_grad, (0, 0, 0, 1))
    logits_grad = torch.cat([share, -share])[:, None, None] * nll_grad

    def loss_of_logits():
        return loss(*response_logps(logits, tokens, mask).split(B))

    def loss_of_policy():
        return loss(*pair_logps(policy, batch))

    table = [("log pi(y_w|x)", chosen, -share, lambda: loss(chosen, rejected)),
             ("log pi(y_l|x)", rejected, share, lambda: loss(chosen, rejected)),
             ("logits", logits, logits_grad, loss_of_logits)]
    for (name, p), g in zip(policy.named_parameters(), analytic_gradient(policy, batch, beta)):
        table.append((name, p, g, loss_of_policy))
    rows = []
    for name, x, g, f in table:
        auto, = torch.autograd.grad(f(), [x], allow_unused=True, materialize_grads=True)
        rows.append((name, tuple(x.shape), (g - auto).abs().max().item(),
                     (g - central_differences(f, x)).abs().max().item(), g.abs().max().item()))
    return rows


def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_label_smoothing(label_smoothing)
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    chosen_rewards, rejected_rewards = implicit_rewards(*logps, beta)
    losses = _bce(beta * preference_logits(*logps), 1 - label_smoothing)
    return losses, chosen_rewards, rejected_rewards


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_label_smoothing(label_smoothing)
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    chosen_rewards, rejected_rewards = implicit_rewards(*logps, beta)
    z = beta * preference_logits(*logps)
    losses = (1 - label_smoothing) * _bce(z, 1.0) - label_smoothing * _bce(z, 0.0)
    return losses / (1 - 2 * label_smoothing), chosen_rewards, rejected_rewards


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    chosen_rewards, rejected_rewards = implicit_rewards(*logps, beta)
    h = preference_logits(*logps)
    losses = F.mse_loss(h, torch.full_like(h, 1 / (2 * beta)), reduction="none")
    return losses, chosen_rewards, rejected_rewards


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    chosen_rewards, rejected_rewards = implicit_rewards(*logps, beta)
    z = beta * preference_logits(*logps)
    losses = F.margin_ranking_loss(z, torch.zeros_like(z), torch.ones_like(z), margin=1.0,
                                   reduction="none")
    return losses, chosen_rewards, rejected_rewards


def missing_mass(policy_logps, ref_logps):
    _check_pairs(policy_logps, ref_logps)
    return (1 - torch.exp(policy_logps - ref_logps)).mean()
