"""DPO on transposed tensors: time or vocabulary first."""
import torch
import torch.nn.functional as F


def _up(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_logits(logits, tokens):
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)}")


def _check_mask(tokens, response_mask):
    if tokens.shape != response_mask.shape:
        raise ValueError(f"tokens {tuple(tokens.shape)}, mask {tuple(response_mask.shape)}")


def _check_equal(*xs):
    if any(x.shape != xs[0].shape for x in xs):
        raise ValueError("shapes " + " / ".join(str(tuple(x.shape)) for x in xs))


def _check_beta(beta):
    if not beta > 0:
        raise ValueError(f"beta={beta}")


def _check_smoothing(label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}")


def _next(x):
    """(B,T) -> (T-1,B): the next tokens, or whether they are scored."""
    return x.t().narrow(0, 1, max(x.shape[1] - 1, 0)) if x.shape[1] else x.t()


def token_logps(logits, tokens):
    _check_logits(logits, tokens)
    by_vocab = logits.permute(2, 1, 0)[:, :-1]                   # (V,T-1,B)
    logps = F.log_softmax(_up(by_vocab), dim=0)
    index = _next(tokens).long().unsqueeze(0)                    # (1,T-1,B)
    return torch.gather(logps, 0, index).squeeze(0).t()


def response_logps(logits, tokens, response_mask, average=False):
    _check_logits(logits, tokens)
    _check_mask(tokens, response_mask)
    inside = _next(response_mask).bool()                         # (T-1,B)
    outside = torch.cat([~inside, torch.ones_like(inside[:1])]) if len(inside) \
        else torch.ones_like(response_mask.t(), dtype=torch.bool)
    by_vocab = logits.movedim(-1, 0).masked_fill(outside.t().expand(logits.shape[-1], -1, -1), 0)
    logps = token_logps(by_vocab.movedim(0, -1), tokens).t().masked_fill(~inside, 0)
    total = logps.sum(dim=0)
    if average:
        total = total / inside.sum(dim=0).clamp(min=1)
    return total


def sequence_logps(policy, tokens, response_mask):
    _check_mask(tokens, response_mask)
    inside = _next(response_mask).bool()                         # (T-1,B), time first
    states = policy.hidden(tokens).transpose(0, 1)[:-1][inside]  # (N,C)
    logits = _up(policy.head(states)).t()                        # (V,N)
    index = _next(tokens).long()[inside].unsqueeze(0)
    picked = F.log_softmax(logits, dim=0).gather(0, index).squeeze(0)
    grid = picked.new_zeros(inside.shape).index_put(inside.nonzero(as_tuple=True), picked)
    return grid.sum(dim=0)


def pair_logps(policy, batch):
    tokens = batch["tokens"]
    logps = response_logps(policy(tokens), tokens, batch["response_mask"])
    return logps.view(2, -1).unbind(0) if logps.is_contiguous() else logps.reshape(2, -1).unbind(0)


def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    _check_equal(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    grid = torch.stack([policy_chosen_logps, policy_rejected_logps,
                        ref_chosen_logps, ref_rejected_logps], dim=-1).unflatten(-1, (2, 2))
    by_answer = grid.transpose(-2, -1)                           # (...,chosen/rejected,policy/ref)
    policy, ref = by_answer.unbind(-1)
    chosen, rejected = (policy - ref).unbind(-1)
    return chosen - rejected


def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    _check_beta(beta)
    _check_equal(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps], dim=-1)
    ref = torch.stack([ref_chosen_logps, ref_rejected_logps], dim=-1)
    return tuple((beta * (policy - ref)).detach().unbind(-1))


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    _check_beta(beta)
    h = preference_logits(*logps)
    return (-F.logsigmoid(beta * h), *implicit_rewards(*logps, beta))


def gradient_weight(chosen_rewards, rejected_rewards):
    _check_equal(chosen_rewards, rejected_rewards)
    rewards = torch.stack([rejected_rewards, chosen_rewards], dim=-1)
    return rewards.softmax(dim=-1).select(-1, 0)


def analytic_gradient(policy, batch, beta):
    chosen, rejected = pair_logps(policy, batch)
    rewards = implicit_rewards(chosen, rejected, batch["ref_chosen_logps"],
                               batch["ref_rejected_logps"], beta)
    weight = gradient_weight(*rewards)
    B = chosen.shape[0]
    seed = chosen.new_tensor(-beta / B).expand(B)                # stride 0
    params = list(policy.parameters())
    live = [p for p in params if p.requires_grad]
    grads = torch.autograd.grad(weight * (chosen - rejected), live, seed, allow_unused=True)
    place = {p: g for p, g in zip(live, grads) if g is not None}
    return [place[p] if p in place else torch.zeros_like(p) for p in params]


def _number(y):
    return y.item() if isinstance(y, torch.Tensor) else float(y)


def central_differences(f, x, eps=1e-5):
    moved = x.detach().permute(tuple(reversed(range(x.dim()))))        # a view: same memory
    grad = torch.zeros_like(moved)
    for index in torch.ones(moved.shape).nonzero().tolist():
        index = tuple(index)
        old = moved[index].clone()
        try:
            moved[index] = old + eps
            above = _number(f())
            moved[index] = old - eps
            below = _number(f())
        finally:
            moved[index] = old
        grad[index] = (above - below) / (2 * eps)
    return grad.permute(tuple(reversed(range(x.dim()))))


def gradient_check(policy, batch, beta):
    tokens, mask = batch["tokens"], batch["response_mask"]
    ref_chosen, ref_rejected = batch["ref_chosen_logps"], batch["ref_rejected_logps"]

    def loss(chosen, rejected):
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)[0].mean()

    def loss_of_logits():
        return loss(*response_logps(logits, tokens, mask).reshape(2, -1).unbind(0))

    def loss_of_policy():
        return loss(*pair_logps(policy, batch))

    def compare(name, x, analytic, f):
        auto = torch.autograd.grad(f(), x, allow_unused=True, materialize_grads=True)[0]
        errors = torch.stack([analytic, analytic - auto, analytic - central_differences(f, x)], -1)
        largest, a, d = errors.flatten(0, -2).abs().amax(0).tolist()
        return name, tuple(x.shape), a, d, largest

    logits = policy(tokens).detach().clone().requires_grad_()
    chosen, rejected = [x.detach().clone().requires_grad_() for x in
                        response_logps(logits, tokens, mask).reshape(2, -1).unbind(0)]
    weight = gradient_weight(*implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta))
    seed = beta / len(weight) * torch.stack([-weight, weight])   # (2,B)
    yield compare("log pi(y_w|x)", chosen, seed[0], lambda: loss(chosen, rejected))
    yield compare("log pi(y_l|x)", rejected, seed[1], lambda: loss(chosen, rejected))

    by_vocab = -logits.detach().movedim(-1, 0).softmax(0)        # (V,2B,T)
    index = _next(tokens).t().long().unsqueeze(0)
    by_vocab[:, :, :-1].scatter_add_(0, index, torch.ones_like(by_vocab[:1, :, :-1]))
    inside = F.pad(_next(mask).t().bool(), (0, 1))
    analytic = by_vocab * inside * seed.flatten().unsqueeze(-1)
    yield compare("logits", logits, analytic.movedim(0, -1), loss_of_logits)

    for (name, p), g in zip(policy.named_parameters(), analytic_gradient(policy, batch, beta)):
        yield compare(name, p, g, loss_of_policy)


def _sides(logps, beta):
    """-log sigma(beta h) and -log sigma(-beta h)."""
    z = beta * preference_logits(*logps)
    return (-F.logsigmoid(torch.stack([z, -z], dim=-1))).unbind(-1)


def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    _check_beta(beta)
    _check_smoothing(label_smoothing)
    right, flipped = _sides(logps, beta)
    return (torch.lerp(right, flipped, label_smoothing), *implicit_rewards(*logps, beta))


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    _check_beta(beta)
    _check_smoothing(label_smoothing)
    right, flipped = _sides(logps, beta)
    losses = ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return (losses, *implicit_rewards(*logps, beta))


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    _check_beta(beta)
    return ((preference_logits(*logps) - 1 / (2 * beta)).pow(2), *implicit_rewards(*logps, beta))


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    _check_beta(beta)
    slack = 1 - beta * preference_logits(*logps)
    zero = slack.new_zeros(()).expand_as(slack)
    return (torch.stack([slack, zero], dim=-1).max(dim=-1).values, *implicit_rewards(*logps, beta))


def missing_mass(policy_logps, ref_logps):
    _check_equal(policy_logps, ref_logps)
    policy, ref = torch.stack([policy_logps, ref_logps], dim=-1).unbind(-1)
    return 1 - (policy - ref).exp().mean()
