"""DPO with torch.func: functions of one token, of one pair; vmap does the rest."""
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value, jacrev, vjp, vmap


def _check_beta(beta):
    if not beta > 0:
        raise ValueError(f"beta={beta}")


def _check_eps(label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}")


def _check_same(*xs):
    if len({tuple(x.shape) for x in xs}) != 1:
        raise ValueError(f"shapes differ: {[tuple(x.shape) for x in xs]}")


def _check_logits(logits, tokens):
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)}")


def _one_token(logits, token):
    """(V,), () -> ()"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits, dim=0).gather(0, token.long()[None])[0]


def _pairwise(f, *xs):
    """f of scalars, for every pair."""
    shape = xs[0].shape
    out = vmap(f)(*(x.reshape(-1) for x in xs))
    if isinstance(out, tuple):
        return tuple(o.reshape(shape) for o in out)
    return out.reshape(shape)


def token_logps(logits, tokens):
    _check_logits(logits, tokens)
    if tokens[:, 1:].numel() == 0:
        return logits[:, 1:, 0].to(torch.promote_types(logits.dtype, torch.float32))
    return vmap(vmap(_one_token))(logits[:, :-1], tokens[:, 1:])


def response_logps(logits, tokens, response_mask, average=False):
    _check_logits(logits, tokens)
    _check_same(tokens, response_mask)

    def one(logits, tokens, mask):
        mask = mask.bool()[1:]
        safe = torch.where(mask[:, None], logits[:-1], torch.zeros_like(logits[:-1]))
        logps = vmap(_one_token)(safe, tokens[1:])
        total = torch.where(mask, logps, torch.zeros_like(logps)).sum()
        return total / mask.sum().clamp(min=1) if average else total

    if tokens[:, 1:].numel() == 0:
        return token_logps(logits, tokens).sum(-1)
    return vmap(one)(logits, tokens, response_mask)


def sequence_logps(policy, tokens, response_mask):
    _check_same(tokens, response_mask)
    b, t = response_mask[:, 1:].nonzero(as_tuple=True)
    logits = policy.head(policy.hidden(tokens)[b, t])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if len(b) == 0:
        return logits.sum() + logits.new_zeros(len(tokens))
    logps = vmap(_one_token)(logits, tokens[b, t + 1])
    return logps.new_zeros(len(tokens)).index_add(0, b, logps)


def pair_logps(policy, batch):
    logps = response_logps(policy(batch["tokens"]), batch["tokens"], batch["response_mask"])
    return logps.tensor_split(2)


def _h(pc, pr, rc, rr):
    return (pc - pr) - (rc - rr)


def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    four = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    _check_same(*four)
    return _pairwise(_h, *four)


def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    four = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    _check_beta(beta)
    _check_same(*four)
    return _pairwise(lambda pc, pr, rc, rr: (beta * (pc - rc), beta * (pr - rr)),
                     *(x.detach() for x in four))


def _losses(of_h, four, beta):
    _check_beta(beta)
    _check_same(*four)
    return (_pairwise(lambda *one: of_h(_h(*one)), *four), *implicit_rewards(*four, beta))


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    four = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    return _losses(lambda h: -F.logsigmoid(beta * h), four, beta)


def gradient_weight(chosen_rewards, rejected_rewards):
    # sigma is the derivative of softplus
    _check_same(chosen_rewards, rejected_rewards)
    return _pairwise(grad(lambda l, w: -F.logsigmoid(w - l)), rejected_rewards, chosen_rewards)


def _parameters(policy):
    return {name: p.detach() for name, p in policy.named_parameters()}


def _pairs_of(policy, batch):
    """parameters -> (log pi(y_w|x), log pi(y_l|x))"""
    return lambda params: pair_logps(lambda tokens: functional_call(policy, params, (tokens,)),
                                     batch)


def analytic_gradient(policy, batch, beta):
    (chosen, rejected), pull = vjp(_pairs_of(policy, batch), _parameters(policy))
    rewards = implicit_rewards(chosen, rejected, batch["ref_chosen_logps"],
                               batch["ref_rejected_logps"], beta)
    seed = (-beta * gradient_weight(*rewards) / len(chosen)).to(chosen.dtype)
    grads, = pull((seed, -seed))
    return list(grads.values())


def _number(y):
    return y.item() if isinstance(y, torch.Tensor) else float(y)


def central_differences(f, x, eps=1e-5):
    def at(index, value):
        with torch.no_grad():
            x.index_put_(index, value) if x.dim() else x.copy_(value)

    start = x.detach().clone()
    out = []
    for i in range(x.numel()):
        index = torch.unravel_index(torch.tensor(i), x.shape) if x.dim() else ()
        old = start[index]
        try:
            values = []
            for step in (eps, -eps):
                at(index, old + step)
                values.append(_number(f()))
        finally:
            at(index, old)
        out.append((values[0] - values[1]) / (2 * eps))
    return torch.tensor(out, dtype=x.dtype, device=x.device).reshape(x.shape)


def gradient_check(policy, batch, beta):
    tokens, mask = batch["tokens"], batch["response_mask"]
    refs = batch["ref_chosen_logps"], batch["ref_rejected_logps"]

    def loss_of_pair(pair):
        return dpo_loss(*pair, *refs, beta)[0].mean()

    def logps_of(logits):
        return response_logps(logits, tokens, mask)

    def loss_of_logits(logits):
        return loss_of_pair(logps_of(logits).tensor_split(2))

    pairs_of = _pairs_of(policy, batch)

    def loss_of_params(params):
        return loss_of_pair(pairs_of(params))

    def row(name, x, analytic, auto, f):
        with torch.no_grad():
            numeric = central_differences(f, x)
        return (name, tuple(x.shape), (analytic - auto).abs().max().item(),
                (analytic - numeric).abs().max().item(), analytic.abs().max().item())

    logits = policy(tokens).detach().clone()
    pair = tuple(x.clone() for x in logps_of(logits).tensor_split(2))
    seed = -beta * gradient_weight(*implicit_rewards(*pair, *refs, beta)) / len(pair[0])
    for name, x, analytic, auto in zip(("log pi(y_w|x)", "log pi(y_l|x)"), pair, (seed, -seed),
                                       grad(loss_of_pair)(pair)):
        yield row(name, x, analytic, auto, lambda: loss_of_pair(pair))

    jacobian = jacrev(logps_of)(logits)                       # (2B,2B,T,V)
    analytic = torch.tensordot(torch.cat([seed, -seed]), jacobian, dims=1)
    yield row("logits", logits, analytic, grad(loss_of_logits)(logits),
              lambda: loss_of_logits(logits))

    params = {name: p.clone() for name, p in _parameters(policy).items()}
    auto, _ = grad_and_value(loss_of_params)(params)
    for (name, p), analytic in zip(params.items(), analytic_gradient(policy, batch, beta)):
        yield row(name, p, analytic, auto[name], lambda: loss_of_params(params))


def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_eps(label_smoothing)
    four = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    return _losses(lambda h: -(1 - label_smoothing) * F.logsigmoid(beta * h)
                   - label_smoothing * F.logsigmoid(-beta * h), four, beta)


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    _check_eps(label_smoothing)
    four = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    return _losses(lambda h: (-(1 - label_smoothing) * F.logsigmoid(beta * h)
                              + label_smoothing * F.logsigmoid(-beta * h))
                   / (1 - 2 * label_smoothing), four, beta)


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    _check_beta(beta)
    four = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    return _losses(lambda h: (h - 1 / (2 * beta)) ** 2, four, beta)


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    four = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    return _losses(lambda h: F.relu(1 - beta * h), four, beta)


def missing_mass(policy_logps, ref_logps):
    _check_same(policy_logps, ref_logps)
    return _pairwise(lambda p, r: -torch.expm1(p - r), policy_logps, ref_logps).mean()
