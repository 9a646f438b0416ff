"""DPO with in-place operations, always on tensors of its own."""
import torch
import torch.nn.functional as F


def _own(x):
    """A copy in float32 at least. `.to` alone may return x itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _check(logits, tokens, mask=None):
    if logits is not None and (logits.dim() != 3 or logits.shape[:2] != tokens.shape):
        raise ValueError(f"logits {tuple(logits.shape)} against tokens {tuple(tokens.shape)}")
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"mask {tuple(mask.shape)} against tokens {tuple(tokens.shape)}")


def _check_pairs(*xs):
    for x in xs[1:]:
        if x.shape != xs[0].shape:
            raise ValueError(f"{tuple(xs[0].shape)} against {tuple(x.shape)}")


def _check_beta(beta):
    if not beta > 0:
        raise ValueError(f"beta={beta}")


def _check_smoothing(label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}")


def _normalised(x):
    """x (...,V), ours -> log softmax, in the same memory."""
    x.sub_(x.detach().amax(-1, keepdim=True))      # large logits would swallow the logarithm
    # logsumexp keeps x for its backward pass, so it gets a copy of its own
    return x.sub_(x.clone().logsumexp(-1, keepdim=True))


def token_logps(logits, tokens):
    _check(logits, tokens)
    x = _normalised(_own(logits[:, :-1]))
    return x.gather(-1, tokens[:, 1:].long().unsqueeze(-1)).squeeze_(-1)


def response_logps(logits, tokens, response_mask, average=False):
    _check(logits, tokens, response_mask)
    outside = response_mask.bool().logical_not()[:, 1:]
    x = logits.clone()
    x[:, :-1].masked_fill_(outside.unsqueeze(-1), 0)
    logps = token_logps(x, tokens).clone().masked_fill_(outside, 0)
    total = logps.new_zeros(tokens.shape[0])
    total += logps.sum(1)
    if average:
        count = outside.logical_not().sum(1).clamp_(min=1)
        total.div_(count)
    return total


def sequence_logps(policy, tokens, response_mask):
    _check(None, tokens, response_mask)
    inside = response_mask.bool()[:, 1:]
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None].expand_as(inside)[inside]
    x = _normalised(_own(policy.head(policy.hidden(tokens)[:, :-1][inside])))
    picked = x.gather(-1, tokens[:, 1:][inside].long().unsqueeze_(-1)).squeeze_(-1)
    return picked.new_zeros(tokens.shape[0]).index_add_(0, rows, picked)


def pair_logps(policy, batch):
    logps = response_logps(policy(batch["tokens"]), batch["tokens"], batch["response_mask"])
    half = logps.shape[0] // 2
    # clones: views of one tensor must not be changed in place, one after the other
    return logps[:half].clone(), logps[half:].clone()


def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    _check_pairs(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    ref = ref_chosen_logps - ref_rejected_logps
    h = policy_chosen_logps.to(torch.promote_types(policy_chosen_logps.dtype, ref.dtype), copy=True)
    h -= policy_rejected_logps
    h -= ref
    return h


def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    _check_beta(beta)
    _check_pairs(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    with torch.no_grad():
        chosen = (policy_chosen_logps - ref_chosen_logps).mul_(beta)
        rejected = (policy_rejected_logps - ref_rejected_logps).mul_(beta)
    return chosen, rejected


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    four = [policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps]
    rewards = implicit_rewards(*four, beta)
    losses = F.logsigmoid(preference_logits(*four).mul_(beta)).neg_()
    return losses, rewards[0], rewards[1]


def gradient_weight(chosen_rewards, rejected_rewards):
    return rejected_rewards.clone().sub_(chosen_rewards).sigmoid_()


def analytic_gradient(policy, batch, beta):
    chosen, rejected = pair_logps(policy, batch)
    weight = gradient_weight(*implicit_rewards(
        chosen, rejected, batch["ref_chosen_logps"], batch["ref_rejected_logps"], beta))
    seed = weight.mul_(-beta).div_(weight.numel()).to(chosen.dtype)
    params = list(policy.parameters())
    out = [torch.zeros_like(p) for p in params]
    live = [i for i, p in enumerate(params) if p.requires_grad]
    for logps, s in ((chosen, seed), (rejected, seed.neg())):
        grads = torch.autograd.grad(logps, [params[i] for i in live], s,
                                    retain_graph=True, allow_unused=True)
        for i, g in zip(live, grads):
            if g is not None:
                out[i].add_(g)
    return out


def _number(y):
    return y.item() if isinstance(y, torch.Tensor) else float(y)


def central_differences(f, x, eps=1e-5):
    start = x.detach().clone()
    out = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
    mark = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    try:
        for i in range(x.numel()):
            mark.zero_()[i] = True
            where = mark.view(x.shape)
            with torch.no_grad():
                x.add_(where.to(x.dtype), alpha=eps)
            out[i] += _number(f())
            with torch.no_grad():
                x.copy_(start).sub_(where.to(x.dtype), alpha=eps)
            out[i] -= _number(f())
            with torch.no_grad():
                x.copy_(start)
    finally:
        with torch.no_grad():
            x.copy_(start)
    return out.div_(2 * eps).view(x.shape)


def gradient_check(policy, batch, beta):
    tokens, mask = batch["tokens"], batch["response_mask"]
    ref = batch["ref_chosen_logps"], batch["ref_rejected_logps"]

    def loss(chosen, rejected):
        return dpo_loss(chosen, rejected, *ref, beta)[0].mean()

    def row(name, x, analytic, f):
        auto, = torch.autograd.grad(f(), x, allow_unused=True)
        auto = torch.zeros_like(x) if auto is None else auto
        numeric = central_differences(f, x)
        return (name, tuple(x.shape), auto.clone().sub_(analytic).abs_().max().item(),
                numeric.sub_(analytic).abs_().max().item(), analytic.abs().max().item())

    logits = policy(tokens).detach().clone().requires_grad_()
    both = response_logps(logits, tokens, mask).detach()
    half = both.shape[0] // 2
    chosen, rejected = both[:half].clone().requires_grad_(), both[half:].clone().requires_grad_()
    seed = gradient_weight(*implicit_rewards(chosen, rejected, *ref, beta)).mul_(-beta).div_(half)
    yield row("log pi(y_w|x)", chosen, seed, lambda: loss(chosen, rejected))
    yield row("log pi(y_l|x)", rejected, seed.neg(), lambda: loss(chosen, rejected))

    analytic = logits.detach().softmax(-1).neg_()
    inner = analytic[:, :-1]
    inner.scatter_add_(-1, tokens[:, 1:, None].long(), torch.ones_like(inner[..., :1]))
    inner.masked_fill_(mask.bool().logical_not()[:, 1:, None], 0)
    analytic[:, -1].zero_()
    analytic[:half].mul_(seed[:, None, None])
    analytic[half:].mul_(seed.neg()[:, None, None])

    def loss_of_logits():
        logps = response_logps(logits, tokens, mask)
        return loss(logps[:half], logps[half:])

    yield row("logits", logits, analytic, loss_of_logits)
    for (name, p), g in zip(policy.named_parameters(), analytic_gradient(policy, batch, beta)):
        yield row(name, p, g, lambda: loss(*pair_logps(policy, batch)))


def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_smoothing(label_smoothing)
    four = [policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps]
    rewards = implicit_rewards(*four, beta)
    z = preference_logits(*four).mul_(beta)
    losses = F.logsigmoid(z).mul_(label_smoothing - 1)
    losses.sub_(F.logsigmoid(-z), alpha=label_smoothing)
    return losses, rewards[0], rewards[1]


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_smoothing(label_smoothing)
    four = [policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps]
    rewards = implicit_rewards(*four, beta)
    z = preference_logits(*four).mul_(beta)
    losses = F.logsigmoid(z).mul_(label_smoothing - 1)
    losses.add_(F.logsigmoid(-z), alpha=label_smoothing).div_(1 - 2 * label_smoothing)
    return losses, rewards[0], rewards[1]


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    four = [policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps]
    rewards = implicit_rewards(*four, beta)
    return preference_logits(*four).sub_(1 / (2 * beta)).square_(), rewards[0], rewards[1]


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    four = [policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps]
    rewards = implicit_rewards(*four, beta)
    return preference_logits(*four).mul_(-beta).add_(1).relu_(), rewards[0], rewards[1]


def missing_mass(policy_logps, ref_logps):
    _check_pairs(policy_logps, ref_logps)
    return (policy_logps - ref_logps).exp_().mean().neg_().add_(1)
