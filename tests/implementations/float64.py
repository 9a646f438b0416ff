"""DPO, computed in float64 inside."""
import torch
import torch.nn.functional as F


def _result_dtype(*xs):
    """float32 at least, float64 if there is any."""
    dtype = torch.float32
    for x in xs:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _same_shapes(**named):
    shapes = [tuple(x.shape) for x in named.values()]
    if shapes.count(shapes[0]) != len(shapes):
        raise ValueError("; ".join(f"{k} {s}" for k, s in zip(named, shapes)))


def _positive(beta):
    if not beta > 0:
        raise ValueError(f"beta={beta}")


def _below_half(label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}")


def _fit(logits, tokens):
    if logits.dim() != 3 or logits.shape[0] != tokens.shape[0] or logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)}; tokens {tuple(tokens.shape)}")


def _token64(logits, tokens):
    logps = torch.log_softmax(logits[:, :-1], dim=-1, dtype=torch.float64)
    return logps.gather(2, tokens[:, 1:, None].to(torch.int64))[:, :, 0]


def token_logps(logits, tokens):
    _fit(logits, tokens)
    return _token64(logits, tokens).to(_result_dtype(logits))


def response_logps(logits, tokens, response_mask, average=False):
    _fit(logits, tokens)
    _same_shapes(tokens=tokens, response_mask=response_mask)
    inside = response_mask.to(torch.bool)[:, 1:]
    ahead = torch.zeros_like(response_mask, dtype=torch.bool)
    ahead[:, :-1] = inside
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    logps = _token64(torch.where(ahead[..., None], logits, zero), tokens)
    total = torch.where(inside, logps, 0.0).sum(dim=1)
    if average:
        total = total / inside.sum(dim=1).double().clamp(min=1)
    return total.to(_result_dtype(logits))


def sequence_logps(policy, tokens, response_mask):
    _same_shapes(tokens=tokens, response_mask=response_mask)
    inside = response_mask.to(torch.bool)[:, 1:]
    where = inside.nonzero()
    logits = policy.head(policy.hidden(tokens)[where[:, 0], where[:, 1]])
    logps = torch.log_softmax(logits, dim=-1, dtype=torch.float64)
    logps = logps.gather(1, tokens[where[:, 0], where[:, 1] + 1].to(torch.int64)[:, None])[:, 0]
    total = torch.zeros(len(tokens), dtype=torch.float64, device=logps.device)
    return total.scatter_add(0, where[:, 0], logps).to(_result_dtype(logits))


def pair_logps(policy, batch):
    logps = response_logps(policy(batch["tokens"]), batch["tokens"], batch["response_mask"])
    return tuple(logps.reshape(2, -1))


def _ratios64(pc, pr, rc, rr):
    _same_shapes(policy_chosen=pc, policy_rejected=pr, ref_chosen=rc, ref_rejected=rr)
    return pc.double() - rc.double(), pr.double() - rr.double()


def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    four = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    chosen, rejected = _ratios64(*four)
    return (chosen - rejected).to(_result_dtype(*four))


def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    _positive(beta)
    four = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    chosen, rejected = _ratios64(*four)
    dtype = _result_dtype(*four)
    return (beta * chosen).detach().to(dtype), (beta * rejected).detach().to(dtype)


def _outcome(four, beta, loss_of_h):
    rewards = implicit_rewards(*four, beta)
    chosen, rejected = _ratios64(*four)
    return (loss_of_h(chosen - rejected).to(_result_dtype(*four)),) + rewards


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    return _outcome((policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps), beta,
                    lambda h: -F.logsigmoid(beta * h))


def gradient_weight(chosen_rewards, rejected_rewards):
    _same_shapes(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    weight = torch.sigmoid(rejected_rewards.double() - chosen_rewards.double())
    return weight.to(_result_dtype(chosen_rewards, rejected_rewards))


def analytic_gradient(policy, batch, beta):
    with torch.enable_grad():
        chosen, rejected = pair_logps(policy, batch)
        rewards = implicit_rewards(chosen, rejected, batch["ref_chosen_logps"],
                                   batch["ref_rejected_logps"], beta)
        weight = torch.sigmoid(rewards[1].double() - rewards[0].double())
        inner = -beta * (weight * (chosen.double() - rejected.double())).mean()
    params = list(policy.parameters())
    moving = [p for p in params if p.requires_grad]
    grads = list(torch.autograd.grad(inner, moving, allow_unused=True, materialize_grads=True))
    return [grads.pop(0) if p.requires_grad else torch.zeros_like(p) for p in params]


def _number(y):
    return y.item() if isinstance(y, torch.Tensor) else float(y)


def central_differences(f, x, eps=1e-5):
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    data = x.detach()                       # the same memory, without a graph
    places = torch.ones(x.shape).nonzero().tolist()
    for place in map(tuple, places):
        old = data[place].item()
        try:
            data[place] = old + eps
            high, f_high = data[place].item(), _number(f())
            data[place] = old - eps
            low, f_low = data[place].item(), _number(f())
        finally:
            data[place] = old
        out[place] = (f_high - f_low) / (high - low)      # the step that was really made
    return out.to(x.dtype)


def gradient_check(policy, batch, beta):
    tokens, mask = batch["tokens"], batch["response_mask"]
    ref = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])

    def loss_of(logps):
        return dpo_loss(*logps.reshape(2, -1), *ref, beta)[0].double().mean()

    def compare(name, x, analytic, auto, f):
        with torch.no_grad():
            numeric = central_differences(f, x)
        analytic = analytic.double()
        return (name, tuple(x.shape), float((analytic - auto.double()).abs().max()),
                float((analytic - numeric.double()).abs().max()), float(analytic.abs().max()))

    logits = policy(tokens).detach().clone().requires_grad_()
    logps = response_logps(logits, tokens, mask).detach().requires_grad_()
    B = len(logps) // 2
    weight = gradient_weight(*implicit_rewards(logps[:B], logps[B:], *ref, beta))
    seed = torch.cat([-beta * weight / B, beta * weight / B])
    auto, = torch.autograd.grad(loss_of(logps), logps)
    # a row of logps is moved through a view, so that loss_of sees it
    for name, part in (("log pi(y_w|x)", slice(0, B)), ("log pi(y_l|x)", slice(B, None))):
        yield compare(name, logps.detach()[part], seed[part], auto[part], lambda: loss_of(logps))

    softmax = torch.softmax(logits.detach(), dim=-1, dtype=torch.float64)
    analytic = torch.zeros_like(softmax)
    hit = torch.zeros_like(softmax[:, 1:])
    hit.scatter_(2, tokens[:, 1:, None].to(torch.int64), 1)
    analytic[:, :-1] = hit - softmax[:, :-1]
    analytic[:, :-1] *= mask[:, 1:, None].bool()
    analytic *= seed[:, None, None]
    auto, = torch.autograd.grad(loss_of(response_logps(logits, tokens, mask)), logits)
    yield compare("logits", logits, analytic, auto,
                  lambda: loss_of(response_logps(logits, tokens, mask)))

    def loss_of_policy():
        return loss_of(torch.cat(pair_logps(policy, batch)))

    names, params = zip(*policy.named_parameters())
    auto = torch.autograd.grad(loss_of_policy(), params, allow_unused=True, materialize_grads=True)
    for name, p, g, a in zip(names, params, analytic_gradient(policy, batch, beta), auto):
        yield compare(name, p, g, a, loss_of_policy)


def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _below_half(label_smoothing)
    return _outcome((policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps), beta,
                    lambda h: -(1 - label_smoothing) * F.logsigmoid(beta * h)
                    - label_smoothing * F.logsigmoid(-beta * h))


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _below_half(label_smoothing)
    return _outcome((policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps), beta,
                    lambda h: (-(1 - label_smoothing) * F.logsigmoid(beta * h)
                               + label_smoothing * F.logsigmoid(-beta * h))
                    / (1 - 2 * label_smoothing))


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    return _outcome((policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps), beta,
                    lambda h: (h - 1 / (2 * beta)).square())


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    return _outcome((policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps), beta,
                    lambda h: (1 - beta * h).clamp(min=0))


def missing_mass(policy_logps, ref_logps):
    _same_shapes(policy_logps=policy_logps, ref_logps=ref_logps)
    mass = torch.exp(policy_logps.double() - ref_logps.double()).mean()
    return (1 - mass).to(_result_dtype(policy_logps, ref_logps))
