"""DPO with plain Python loops."""
import math

import torch
import torch.nn.functional as F


def _wide(x):
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def _check_beta(beta):
    if not beta > 0:
        raise ValueError(f"beta={beta} must be greater than 0")


def _check_label_smoothing(label_smoothing):
    if not (label_smoothing >= 0 and label_smoothing < 0.5):
        raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 0.5)")


def _check_shapes(*tensors):
    for x in tensors:
        if x.shape != tensors[0].shape:
            raise ValueError("shapes differ: " + ", ".join(str(tuple(t.shape)) for t in tensors))


def _log_prob(scores, token):
    """scores (V,) -> log p(token), a scalar."""
    return F.log_softmax(_wide(scores), dim=0)[int(token)]


def _stack(rows, like):
    """torch.stack refuses an empty list."""
    return torch.stack(rows) if rows else like


def token_logps(logits, tokens):
    if logits.dim() != 3 or tuple(logits.shape[:2]) != tuple(tokens.shape):
        raise ValueError(f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)}")
    B, T = tokens.shape
    empty = _wide(logits[:, :0, 0])
    rows = []
    for b in range(B):
        row = []
        for t in range(T - 1):
            row.append(_log_prob(logits[b, t], tokens[b, t + 1]))
        rows.append(_stack(row, empty[b]))
    return _stack(rows, empty.reshape(B, 0) if T < 2 else _wide(logits[:, 1:, 0]))


def response_logps(logits, tokens, response_mask, average=False):
    if logits.dim() != 3 or tuple(logits.shape[:2]) != tuple(tokens.shape):
        raise ValueError(f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)}")
    _check_shapes(tokens, response_mask)
    B, T = tokens.shape
    sums = []
    for b in range(B):
        total = _wide(logits[b, :0].sum())          # 0, with a graph behind it
        count = 0
        for t in range(1, T):
            if response_mask[b, t]:
                total = total + _log_prob(logits[b, t - 1], tokens[b, t])
                count += 1
        if average and count > 0:
            total = total / count
        sums.append(total)
    return _stack(sums, _wide(logits[:, 0, 0]) if T else _wide(logits.sum((1, 2))))


def sequence_logps(policy, tokens, response_mask):
    _check_shapes(tokens, response_mask)
    B, T = tokens.shape
    states = policy.hidden(tokens)
    sums = []
    for b in range(B):
        total = _wide(states[b, :0].sum())
        for t in range(T - 1):
            if response_mask[b, t + 1]:
                total = total + _log_prob(policy.head(states[b, t]), tokens[b, t + 1])
        sums.append(total)
    return _stack(sums, _wide(states.sum((1, 2))))


def pair_logps(policy, batch):
    logps = response_logps(policy(batch["tokens"]), batch["tokens"], batch["response_mask"])
    B = len(logps) // 2
    chosen = [logps[i] for i in range(B)]
    rejected = [logps[B + i] for i in range(B)]
    return torch.stack(chosen), torch.stack(rejected)


def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    _check_shapes(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    h = []
    for pc, pr, rc, rr in zip(policy_chosen_logps, policy_rejected_logps,
                              ref_chosen_logps, ref_rejected_logps):
        h.append((pc - pr) - (rc - rr))
    return _stack(h, policy_chosen_logps + ref_chosen_logps)


def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    _check_beta(beta)
    _check_shapes(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    both = []
    with torch.no_grad():
        for policy, ref in ((policy_chosen_logps, ref_chosen_logps),
                            (policy_rejected_logps, ref_rejected_logps)):
            rewards = [beta * (p - r) for p, r in zip(policy, ref)]
            both.append(_stack(rewards, policy + ref))
    return both[0], both[1]


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    _check_beta(beta)
    four = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    h = preference_logits(*four)
    losses = []
    for x in h:
        losses.append(-F.logsigmoid(beta * x))
    chosen, rejected = implicit_rewards(*four, beta)
    return _stack(losses, h), chosen, rejected


def gradient_weight(chosen_rewards, rejected_rewards):
    _check_shapes(chosen_rewards, rejected_rewards)
    weights = []
    for w, l in zip(chosen_rewards, rejected_rewards):
        weights.append(torch.sigmoid(l - w))
    return _stack(weights, chosen_rewards)


def analytic_gradient(policy, batch, beta):
    chosen, rejected = pair_logps(policy, batch)
    rewards = implicit_rewards(chosen, rejected, batch["ref_chosen_logps"],
                               batch["ref_rejected_logps"], beta)
    weights = gradient_weight(*rewards)
    params = list(policy.parameters())
    total = [torch.zeros_like(p) for p in params]
    for b in range(len(chosen)):
        for i, p in enumerate(params):
            if not p.requires_grad:
                continue
            g_w, = torch.autograd.grad(chosen[b], p, retain_graph=True, allow_unused=True)
            g_l, = torch.autograd.grad(rejected[b], p, retain_graph=True, allow_unused=True)
            if g_w is not None:
                total[i] = total[i] - beta * weights[b] * g_w / len(chosen)
            if g_l is not None:
                total[i] = total[i] + beta * weights[b] * g_l / len(chosen)
    return [g.to(p.dtype) for g, p in zip(total, params)]


def _number(y):
    return y.item() if isinstance(y, torch.Tensor) else float(y)


def central_differences(f, x, eps=1e-5):
    grad = torch.zeros(x.shape, dtype=x.dtype, device=x.device)

    def walk(index):
        if len(index) < x.dim():
            for i in range(x.shape[len(index)]):
                walk(index + (i,))
            return
        old = x.detach()[index].clone()
        try:
            with torch.no_grad():
                x[index] = old + eps
            up = _number(f())
            with torch.no_grad():
                x[index] = old - eps
            down = _number(f())
        finally:
            with torch.no_grad():
                x[index] = old
        grad[index] = (up - down) / (2 * eps)

    walk(())
    return grad


def _largest(x):
    largest = 0.0
    for v in x.reshape(-1).tolist():
        v = abs(v)
        if math.isnan(v) or v > largest:
            largest = v
            if math.isnan(v):
                break
    return largest


def gradient_check(policy, batch, beta):
    tokens, mask = batch["tokens"], batch["response_mask"]
    ref_w, ref_l = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    rows = []

    def mean_loss(w, l):
        return dpo_loss(w, l, ref_w, ref_l, beta)[0].mean()

    def add(name, x, analytic, f):
        auto, = torch.autograd.grad(f(), x, allow_unused=True)
        if auto is None:
            auto = torch.zeros_like(x)
        numeric = central_differences(f, x)
        rows.append((name, tuple(x.shape), _largest(analytic - auto), _largest(analytic - numeric),
                     _largest(analytic)))

    logits = policy(tokens).detach().clone().requires_grad_(True)
    logps = response_logps(logits, tokens, mask).detach()
    B = len(logps) // 2
    chosen = logps[:B].clone().requires_grad_(True)
    rejected = logps[B:].clone().requires_grad_(True)
    weights = gradient_weight(*implicit_rewards(chosen, rejected, ref_w, ref_l, beta))

    add("log pi(y_w|x)", chosen, torch.stack([-beta * w / B for w in weights]),
        lambda: mean_loss(chosen, rejected))
    add("log pi(y_l|x)", rejected, torch.stack([beta * w / B for w in weights]),
        lambda: mean_loss(chosen, rejected))

    def loss_of_logits():
        both = response_logps(logits, tokens, mask)
        return mean_loss(both[:B], both[B:])

    by_hand = torch.zeros(logits.shape, dtype=logits.dtype)
    for b in range(2 * B):
        factor = -beta * weights[b] / B if b < B else beta * weights[b - B] / B
        for t in range(tokens.shape[1] - 1):
            if mask[b, t + 1]:
                by_hand[b, t] = -factor * torch.softmax(logits.detach()[b, t], dim=0)
                by_hand[b, t, tokens[b, t + 1]] += factor
    add("logits", logits, by_hand, loss_of_logits)

    analytic = analytic_gradient(policy, batch, beta)
    for (name, p), g in zip(policy.named_parameters(), analytic):
        add(name, p, g, lambda: mean_loss(*pair_logps(policy, batch)))
    return rows


def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_beta(beta)
    _check_label_smoothing(label_smoothing)
    four = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    h = preference_logits(*four)
    losses = []
    for x in h:
        losses.append(-(1 - label_smoothing) * F.logsigmoid(beta * x)
                      - label_smoothing * F.logsigmoid(-beta * x))
    chosen, rejected = implicit_rewards(*four, beta)
    return _stack(losses, h), chosen, rejected


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_beta(beta)
    _check_label_smoothing(label_smoothing)
    four = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    h = preference_logits(*four)
    losses = []
    for x in h:
        loss = (-(1 - label_smoothing) * F.logsigmoid(beta * x)
                + label_smoothing * F.logsigmoid(-beta * x))
        losses.append(loss / (1 - 2 * label_smoothing))
    chosen, rejected = implicit_rewards(*four, beta)
    return _stack(losses, h), chosen, rejected


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    _check_beta(beta)
    four = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    h = preference_logits(*four)
    losses = []
    for x in h:
        losses.append((x - 1 / (2 * beta)) ** 2)
    chosen, rejected = implicit_rewards(*four, beta)
    return _stack(losses, h), chosen, rejected


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    _check_beta(beta)
    four = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    h = preference_logits(*four)
    losses = []
    for x in h:
        margin = 1 - beta * x
        losses.append(margin if margin > 0 else margin * 0)
    chosen, rejected = implicit_rewards(*four, beta)
    return _stack(losses, h), chosen, rejected


def missing_mass(policy_logps, ref_logps):
    _check_shapes(policy_logps, ref_logps)
    total = 0
    for p, r in zip(policy_logps, ref_logps):
        total = total + torch.exp(p - r)
    return 1 - total / len(policy_logps)
