"""A second, correct implementation of dpo.py, written differently: other losses from PyTorch, loops for gathers, masks by
indexing. The proofs must accept it, and tests/test_exercises.py plants typical mistakes in it, one at a time."""
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

def token_logps(logits, tokens):
    B, T, V = logits.shape
    if (B, T) != tuple(tokens.shape):
        raise ValueError(f"shapes differ: {tuple(logits.shape)} and {tuple(tokens.shape)}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    flat = torch.nn.functional.nll_loss(logits[:, :T-1].reshape(-1, V).log_softmax(1), tokens[:, 1:].reshape(-1), reduction="none")
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
    sums = []
    rows, cols = response_mask[:, 1:].bool().nonzero(as_tuple=True)
    logits = policy.head(h[rows, cols])
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    lp = logits.log_softmax(-1)[torch.arange(len(rows)), tokens[rows, cols + 1]]
    return torch.stack([lp[rows == b].sum() for b in range(len(tokens))])

def preference_logits(pc, pr, rc, rr):
    return (pc - rc) - (pr - rr)

def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
             beta=0.1, loss_type="sigmoid", label_smoothing=0.0):
    pc, pr, rc, rr = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    if not (pc.shape == pr.shape == rc.shape == rr.shape):
        raise ValueError(f"shapes {[tuple(t.shape) for t in (pc, pr, rc, rr)]}")
    if not (beta > 0): raise ValueError(f"beta={beta}")
    if not (0 <= label_smoothing < 0.5): raise ValueError(f"label_smoothing={label_smoothing}")
    if label_smoothing > 0 and loss_type in ("ipo", "hinge"): raise ValueError("not defined")
    h = (pc - rc) - (pr - rr)
    e = label_smoothing
    if loss_type == "sigmoid":
        loss = bce(beta * h, torch.full_like(h, 1 - e), reduction="none")
    elif loss_type == "robust":
        good = bce(beta * h, torch.ones_like(h), reduction="none")
        bad = bce(beta * h, torch.zeros_like(h), reduction="none")
        loss = ((1 - e) * good - e * bad) / (1 - 2 * e)
    elif loss_type == "ipo":
        loss = torch.square(h - 0.5 / beta)
    elif loss_type == "hinge":
        loss = torch.clamp(1 - beta * h, min=0)
    else:
        raise ValueError(f"{loss_type!r}")
    with torch.no_grad():
        return loss, beta * (pc.detach() - rc), beta * (pr.detach() - rr)

def missing_mass(policy_logps, ref_logps):
    return 1 - torch.exp(torch.sub(policy_logps, ref_logps)).sum() / policy_logps.numel()

def gradient_weight(chosen_rewards, rejected_rewards):
    return 1 - torch.sigmoid(chosen_rewards - rejected_rewards)

def pair_logps(policy, batch):
    n = batch["tokens"].shape[0] // 2
    lp = response_logps(policy(batch["tokens"]), batch["tokens"], batch["response_mask"])
    return lp[:n], lp[n:]

def analytic_gradient(policy, batch, beta):
    c, r = pair_logps(policy, batch)
    w = gradient_weight(beta * (c - batch["ref_chosen_logps"]), beta * (r - batch["ref_rejected_logps"])).detach()
    surrogate = -beta * (w * (c - r)).mean()
    return list(torch.autograd.grad(surrogate, list(policy.parameters())))

def central_differences(f, x, eps=1e-5):
    g = torch.zeros(x.shape, dtype=x.dtype)
    for idx in torch.cartesian_prod(*[torch.arange(n) for n in x.shape]).reshape(-1, x.dim()).tolist():
        idx = tuple(idx)
        with torch.no_grad():
            saved = x[idx].clone()
            x[idx] = saved + eps; a = float(f())
            x[idx] = saved - eps; b = float(f())
            x[idx] = saved
        g[idx] = (a - b) / (2 * eps)
    return g

def gradient_check(policy, batch, beta):
    rc, rr = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    tokens, mask = batch["tokens"], batch["response_mask"]
    def from_logps(c, r): return dpo_loss(c, r, rc, rr, beta=beta)[0].mean()
    def from_logits(z):
        lp = response_logps(z, tokens, mask); n = len(lp) // 2
        return from_logps(lp[:n], lp[n:])
    def compare(name, x, mine, f):
        auto, = torch.autograd.grad(f(), [x]); num = central_differences(f, x)
        return name, tuple(x.shape), float((mine-auto).abs().max()), float((mine-num).abs().max()), float(mine.abs().max())
    c, r = [t.detach().requires_grad_() for t in pair_logps(policy, batch)]
    w = gradient_weight(beta*(c-rc), beta*(r-rr)).detach() * beta / len(c)
    yield compare("log pi(y_w|x)", c, -w, lambda: from_logps(c, r))
    yield compare("log pi(y_l|x)", r, w, lambda: from_logps(c, r))
    z = policy(tokens).detach().requires_grad_()
    lp = response_logps(z, tokens, mask); n = len(w)
    mine, = torch.autograd.grad((torch.cat([-w, w]) * lp).sum(), [z])
    yield compare("logits", z, mine, lambda: from_logits(z))
    for (name, p), g in zip(policy.named_parameters(), analytic_gradient(policy, batch, beta)):
        yield compare(name, p, g, lambda: from_logits(policy(tokens)))
