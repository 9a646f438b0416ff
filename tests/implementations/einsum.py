"""DPO with one-hot vectors and einsum."""
import torch
import torch.nn.functional as F
from torch import einsum


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _same(**tensors):
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")


def _check_logits(logits, tokens):
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit tokens {tuple(tokens.shape)}")


def _check_beta(beta):
    if not beta > 0:
        raise ValueError(f"beta={beta}")


def _check_smoothing(label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}")


def _pick(logits, targets):
    """log softmax(logits)[..., targets]; what is not picked may be -inf, so 0 * it is avoided."""
    onehot = F.one_hot(targets.long(), logits.shape[-1])
    logp = F.log_softmax(_wide(logits), dim=-1).masked_fill(onehot == 0, 0)
    return einsum("...v,...v->...", onehot.to(logp.dtype), logp)


def token_logps(logits, tokens):
    _check_logits(logits, tokens)
    return _pick(logits[:, :-1], tokens[:, 1:])


def response_logps(logits, tokens, response_mask, average=False):
    _check_logits(logits, tokens)
    _same(tokens=tokens, response_mask=response_mask)
    scored = response_mask.bool()[:, 1:]
    kept = torch.cat([scored, torch.zeros_like(response_mask[:, :1]).bool()], dim=1)
    logps = token_logps(logits.masked_fill(~kept[..., None], 0), tokens)
    mask = scored.to(logps.dtype)
    total = einsum("bt,bt->b", logps, mask)
    if average:
        total = total / einsum("bt->b", mask).clamp(min=1)
    return total


def sequence_logps(policy, tokens, response_mask):
    _same(tokens=tokens, response_mask=response_mask)
    row, t = response_mask.bool()[:, 1:].nonzero(as_tuple=True)
    logps = _pick(policy.head(policy.hidden(tokens)[row, t]), tokens[row, t + 1])
    owner = F.one_hot(row, tokens.shape[0])
    spread = logps[:, None].expand(owner.shape).masked_fill(owner == 0, 0)
    return einsum("nb->b", spread)


def pair_logps(policy, batch):
    logps = response_logps(policy(batch["tokens"]), batch["tokens"], batch["response_mask"])
    chosen, rejected = logps.unflatten(0, (2, -1))
    return chosen, rejected


def _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    _same(policy_chosen=policy_chosen_logps, policy_rejected=policy_rejected_logps,
          ref_chosen=ref_chosen_logps, ref_rejected=ref_rejected_logps)
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps])
    ref = torch.stack([ref_chosen_logps, ref_rejected_logps])
    return policy - ref


def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    ratios = _log_ratios(policy_chosen_logps, policy_rejected_logps,
                         ref_chosen_logps, ref_rejected_logps)
    return einsum("k...,k->...", ratios, ratios.new_tensor([1, -1]))


def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    _check_beta(beta)
    ratios = _log_ratios(policy_chosen_logps, policy_rejected_logps,
                         ref_chosen_logps, ref_rejected_logps).detach()
    chosen, rejected = einsum("k...,->k...", ratios, ratios.new_tensor(float(beta)))
    return chosen, rejected


def _two_sided(logps, beta, weight_right, weight_flipped):
    rewards = implicit_rewards(*logps, beta)
    z = beta * preference_logits(*logps)
    sides = -F.logsigmoid(torch.stack([z, -z]))
    return einsum("k...,k->...", sides, sides.new_tensor([weight_right, weight_flipped])), *rewards


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    return _two_sided(logps, beta, 1.0, 0.0)


def gradient_weight(chosen_rewards, rejected_rewards):
    rewards = torch.stack([chosen_rewards, rejected_rewards])
    return torch.sigmoid(einsum("k...,k->...", rewards, rewards.new_tensor([-1, 1])))


def analytic_gradient(policy, batch, beta):
    logps = torch.stack(pair_logps(policy, batch))
    ref = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    weight = gradient_weight(*implicit_rewards(*logps, *ref, beta))
    sign = logps.new_tensor([1, -1])
    inner = einsum("kb,k,b->", logps, sign, weight.to(logps.dtype)) * (-beta / logps.shape[1])
    params = list(policy.parameters())
    live = [p for p in params if p.requires_grad]
    grads = dict(zip(map(id, live), torch.autograd.grad(inner, live, allow_unused=True)))
    return [torch.zeros_like(p) if grads.get(id(p)) is None else grads[id(p)] for p in params]


def _number(y):
    return y.item() if isinstance(y, torch.Tensor) else float(y)


def central_differences(f, x, eps=1e-5):
    out = torch.zeros_like(x, requires_grad=False)
    flat = out.new_zeros(x.numel())
    start = x.detach().clone()
    steps = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
    try:
        for i, step in enumerate(steps):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    x.copy_(start + sign * eps * step.reshape(x.shape))
                values.append(_number(f()))
            flat[i] = (values[0] - values[1]) / (2 * eps)
    finally:
        with torch.no_grad():
            x.copy_(start)
    return out.copy_(flat.reshape(x.shape))


def gradient_check(policy, batch, beta):
    tokens, mask = batch["tokens"], batch["response_mask"]
    ref = batch["ref_chosen_logps"], batch["ref_rejected_logps"]

    def loss(chosen, rejected):
        return dpo_loss(chosen, rejected, *ref, beta)[0].mean()

    def from_logits(logits):
        return loss(*response_logps(logits, tokens, mask).unflatten(0, (2, -1)))

    def row(name, x, by_hand, by_autograd, f):
        with torch.no_grad():
            by_steps = central_differences(f, x)
        return (name, tuple(x.shape), (by_hand - by_autograd).abs().max().item(),
                (by_hand - by_steps).abs().max().item(), by_hand.abs().max().item())

    logits = policy(tokens).detach().clone().requires_grad_()
    logps = response_logps(logits, tokens, mask).detach().unflatten(0, (2, -1))
    chosen, rejected = (x.clone().requires_grad_() for x in logps)
    weight = gradient_weight(*implicit_rewards(chosen, rejected, *ref, beta))
    sides = einsum("k,b->kb", weight.new_tensor([-1, 1]), weight) * (beta / len(weight))
    auto = torch.autograd.grad(loss(chosen, rejected), [chosen, rejected])
    for name, x, g, a in zip(("log pi(y_w|x)", "log pi(y_l|x)"), (chosen, rejected), sides, auto):
        yield row(name, x, g, a, lambda: loss(chosen, rejected))

    onehot = F.one_hot(tokens[:, 1:].long(), logits.shape[-1]).to(logits.dtype)
    by_hand = torch.zeros_like(logits, requires_grad=False)
    by_hand[:, :-1] = einsum("btv,bt,b->btv", onehot - logits.detach()[:, :-1].softmax(-1),
                             mask[:, 1:].to(logits.dtype), sides.flatten())
    auto, = torch.autograd.grad(from_logits(logits), logits)
    yield row("logits", logits, by_hand, auto, lambda: from_logits(logits))

    params = dict(policy.named_parameters())
    auto = torch.autograd.grad(loss(*pair_logps(policy, batch)), list(params.values()),
                               allow_unused=True, materialize_grads=True)
    for (name, p), g, a in zip(params.items(), analytic_gradient(policy, batch, beta), auto):
        yield row(name, p, g, a, lambda: loss(*pair_logps(policy, batch)))


def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_smoothing(label_smoothing)
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    return _two_sided(logps, beta, 1 - label_smoothing, label_smoothing)


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_smoothing(label_smoothing)
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    scale = 1 - 2 * label_smoothing
    return _two_sided(logps, beta, (1 - label_smoothing) / scale, -label_smoothing / scale)


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    rewards = implicit_rewards(*logps, beta)
    gap = preference_logits(*logps) - 1 / (2 * beta)
    return einsum("...,...->...", gap, gap), *rewards


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    rewards = implicit_rewards(*logps, beta)
    return (1 - beta * preference_logits(*logps)).relu(), *rewards


def missing_mass(policy_logps, ref_logps):
    _same(policy=policy_logps, ref=ref_logps)
    ratio = (policy_logps - ref_logps).exp()
    return 1 - einsum("b,b->", ratio, torch.full_like(ratio, 1 / len(ratio)))
