"""A second, correct implementation of dpo.py, of losses.py and of model.sequence_logps.

It is written differently: other losses from PyTorch, loops in place of gathers, masks by indexing.
The proofs must accept it. tests/test_exercises.py puts typical mistakes into it, one at a time.
"""
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import nll_loss


def token_logps(logits, tokens):
    B, T, V = logits.shape
    if (B, T) != tuple(tokens.shape):
        raise ValueError(f"shapes differ: {tuple(logits.shape)} and {tuple(tokens.shape)}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    logps = logits[:, :T-1].reshape(-1, V).log_softmax(1)
    flat = nll_loss(logps, tokens[:, 1:].reshape(-1), reduction="none")
    return (-flat).reshape(B, T-1)


def response_logps(logits, tokens, response_mask, average=False):
    if tuple(response_mask.shape) != tuple(tokens.shape):
        raise ValueError(f"mask {tuple(response_mask.shape)}, tokens {tuple(tokens.shape)}")
    lp = token_logps(logits, tokens)
    out = []
    for row, m in zip(lp, response_mask[:, 1:].bool()):
        s = row[m].sum()
        out.append(s / max(1, int(m.sum())) if average else s)
    return torch.stack(out)


def sequence_logps(policy, tokens, response_mask):
    h = policy.hidden(tokens)
    rows, cols = response_mask[:, 1:].bool().nonzero(as_tuple=True)
    logits = policy.head(h[rows, cols])
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    lp = logits.log_softmax(-1)[torch.arange(len(rows)), tokens[rows, cols + 1]]
    return torch.stack([lp[rows == b].sum() for b in range(len(tokens))])


def pair_logps(policy, batch):
    n = batch["tokens"].shape[0] // 2
    lp = response_logps(policy(batch["tokens"]), batch["tokens"], batch["response_mask"])
    return lp[:n], lp[n:]


def preference_logits(pc, pr, rc, rr):
    if not pc.shape == pr.shape == rc.shape == rr.shape:
        raise ValueError(f"shapes {[tuple(t.shape) for t in (pc, pr, rc, rr)]}")
    return (pc - rc) - (pr - rr)


def implicit_rewards(pc, pr, rc, rr, beta):
    if not (beta > 0):
        raise ValueError(f"beta={beta}")
    with torch.no_grad():
        return beta * (pc.detach() - rc), beta * (pr.detach() - rr)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
             beta=0.1):
    pc, pr, rc, rr = (policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps)
    rewards = implicit_rewards(pc, pr, rc, rr, beta)
    h = preference_logits(pc, pr, rc, rr)
    return bce(beta * h, torch.ones_like(h), reduction="none"), *rewards


def cdpo_loss(pc, pr, rc, rr, beta=0.1, label_smoothing=0.1):
    if not (0 <= label_smoothing < 0.5):
        raise ValueError(f"label_smoothing={label_smoothing}")
    rewards = implicit_rewards(pc, pr, rc, rr, beta)
    h = preference_logits(pc, pr, rc, rr)
    targets = torch.full_like(h, 1 - label_smoothing)
    return bce(beta * h, targets, reduction="none"), *rewards


def robust_loss(pc, pr, rc, rr, beta=0.1, label_smoothing=0.1):
    e = label_smoothing
    if not (0 <= e < 0.5):
        raise ValueError(f"label_smoothing={e}")
    rewards = implicit_rewards(pc, pr, rc, rr, beta)
    h = preference_logits(pc, pr, rc, rr)
    right = bce(beta * h, torch.ones_like(h), reduction="none")
    flipped = bce(beta * h, torch.zeros_like(h), reduction="none")
    return ((1 - e) * right - e * flipped) / (1 - 2 * e), *rewards


def ipo_loss(pc, pr, rc, rr, beta=0.1):
    rewards = implicit_rewards(pc, pr, rc, rr, beta)
    return torch.square(preference_logits(pc, pr, rc, rr) - 0.5 / beta), *rewards


def hinge_loss(pc, pr, rc, rr, beta=0.1):
    rewards = implicit_rewards(pc, pr, rc, rr, beta)
    return torch.clamp(1 - beta * preference_logits(pc, pr, rc, rr), min=0), *rewards


def missing_mass(policy_logps, ref_logps):
    return 1 - torch.exp(torch.sub(policy_logps, ref_logps)).sum() / policy_logps.numel()


def gradient_weight(chosen_rewards, rejected_rewards):
    return 1 - torch.sigmoid(chosen_rewards - rejected_rewards)


def analytic_gradient(policy, batch, beta):
    c, r = pair_logps(policy, batch)
    rewards = beta * (c - batch["ref_chosen_logps"]), beta * (r - batch["ref_rejected_logps"])
    w = gradient_weight(*rewards).detach()
    surrogate = -beta * (w * (c - r)).mean()
    return list(torch.autograd.grad(surrogate, list(policy.parameters())))


def central_differences(f, x, eps=1e-5):
    g = torch.zeros(x.shape, dtype=x.dtype)
    indices = torch.cartesian_prod(*[torch.arange(n) for n in x.shape]).reshape(-1, x.dim())
    with torch.no_grad():
        for idx in indices.tolist():
            idx = tuple(idx)
            saved = x[idx].clone()
            x[idx] = saved + eps
            a = float(f())
            x[idx] = saved - eps
            b = float(f())
            x[idx] = saved
            g[idx] = (a - b) / (2 * eps)
    return g


def gradient_check(policy, batch, beta):
    rc, rr = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    tokens, mask = batch["tokens"], batch["response_mask"]

    def from_logps(c, r):
        return dpo_loss(c, r, rc, rr, beta=beta)[0].mean()

    def from_logits(z):
        lp = response_logps(z, tokens, mask)
        n = len(lp) // 2
        return from_logps(lp[:n], lp[n:])

    def compare(name, x, mine, f):
        auto, = torch.autograd.grad(f(), [x])
        num = central_differences(f, x)
        apart = [float((mine - other).abs().max()) for other in (auto, num)]
        return name, tuple(x.shape), *apart, float(mine.abs().max())

    c, r = [t.detach().requires_grad_() for t in pair_logps(policy, batch)]
    w = gradient_weight(beta * (c - rc), beta * (r - rr)).detach() * beta / len(c)
    yield compare("log pi(y_w|x)", c, -w, lambda: from_logps(c, r))
    yield compare("log pi(y_l|x)", r, w, lambda: from_logps(c, r))
    z = policy(tokens).detach().requires_grad_()
    lp = response_logps(z, tokens, mask)
    mine, = torch.autograd.grad((torch.cat([-w, w]) * lp).sum(), [z])
    yield compare("logits", z, mine, lambda: from_logits(z))
    for (name, p), g in zip(policy.named_parameters(), analytic_gradient(policy, batch, beta)):
        yield compare(name, p, g, lambda: from_logits(policy(tokens)))
