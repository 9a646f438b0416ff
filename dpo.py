"""Direct Preference Optimization: the paper in code.

The equations are those of https://arxiv.org/abs/2305.18290v3.

Eq. 3  RLHF maximises E[r(x,y)] - beta KL(pi || ref).
Eq. 4  Its best policy is pi*(y|x) = ref(y|x) exp(r(x,y)/beta) / Z(x).
Eq. 5  So r(x,y) = beta log(pi*(y|x)/ref(y|x)) + beta log Z(x).
Eq. 6  In the difference of two rewards of one prompt, Z(x) cancels.
Eq. 7  What remains is a classification loss, without a reward model.

B pairs, T tokens, V vocabulary. Logarithms are in nats.
*_logps    (B,)  log pi(y|x), a sum over response tokens
logits     (B,)  h, the policy's log-ratio minus the reference's
*_rewards  (B,)  beta log(pi/ref); beta is always included
beta             A LARGER beta is a SHORTER leash: a smaller KL to the
                 reference. It decides which policy is the target.

python dpo.py checks the gradient in three ways.
"""
import torch
import torch.nn.functional as F

# ---- Log-probabilities of responses

def token_logps(logits, tokens):
    """log p(tokens[:, t+1] | tokens[:, :t+1]) for every t.

    logits (B,T,V): a model's output for tokens (B,T).
    Returns (B,T-1), in float32 at least (float64 stays): half precision
    is too coarse for sums. Raises ValueError for shapes that differ.
    """
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be (B, T, V) "
                         f"for tokens (B, T) = {tuple(tokens.shape)}")
    logits = logits[:, :-1]  # (B, T-1, V): nothing follows the last position
    targets = tokens[:, 1:]  # (B, T-1): nothing predicts the first token
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = torch.log_softmax(logits, dim=-1)  # (B, T-1, V)
    return logps.gather(2, targets.unsqueeze(2)).squeeze(2)  # (B, T-1)


def response_logps(logits, tokens, response_mask, average=False):
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t), as in Eq. 7. (B,)

    response_mask (B,T), of booleans or of 0 and 1, is true where
    tokens[b,t] belongs to the response, EOS included. It is false on
    the prompt and on padding. A row without a response gives 0.
    average: divide by the number of response tokens. That is another
    objective: through Eq. 5 no reward belongs to it. IPO's authors
    train with it; for DPO it is a known mistake.
    Raises ValueError for a mask of another shape.
    """
    if response_mask.shape != tokens.shape:
        raise ValueError(f"response_mask {tuple(response_mask.shape)} must have the shape "
                         f"of tokens {tuple(tokens.shape)}")
    mask = response_mask[:, 1:].bool()  # (B, T-1): entry t of token_logps is token t+1
    # torch.where selects. A product would turn a masked -inf into nan.
    logps = torch.where(mask, token_logps(logits, tokens), 0.0)  # (B, T-1)
    if average:
        return logps.sum(-1) / mask.sum(-1).clamp(min=1)  # (B,)
    return logps.sum(-1)  # (B,)


def pair_logps(policy, batch):
    """log pi(y_w|x) and log pi(y_l|x) of a batch of pairs. (B,), (B,)

    policy: a module, tokens (2B,T) -> logits (2B,T,V); it runs once.
    batch: a dict with tokens and response_mask (2B,T), chosen first.
    """
    tokens, mask = batch["tokens"], batch["response_mask"]
    logps = response_logps(policy(tokens), tokens, mask)  # (2B,)
    return logps.chunk(2)  # (B,), (B,)


# ---- The loss

def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    """h, what beta multiplies in Eq. 7: how much more the policy
    prefers chosen to rejected than the reference does. (B,)

    Raises ValueError where shapes differ: (B,) beside (B,1) would
    broadcast to (B,B) pairs that do not exist.
    """
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    shapes = sorted({tuple(t.shape) for t in logps})
    if len(shapes) > 1:
        raise ValueError(f"the four log-probabilities must have one shape (B,), got {shapes}")
    return (policy_chosen_logps - policy_rejected_logps) - (ref_chosen_logps - ref_rejected_logps)


def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    """r^(x,y) = beta log(pi(y|x)/ref(y|x)), section 4, of both. (B,), (B,)

    They carry no gradient: they are for looking at. Raises ValueError
    unless beta > 0 (nan is not): nothing would tie the policy.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps).detach()
    return chosen_rewards, rejected_rewards


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """The DPO loss of each pair, Eq. 7, and its implicit rewards.

    The log-probabilities (B,) come from `response_logps`.
    Returns losses, chosen_rewards and rejected_rewards, each (B,).
    Raises ValueError unless beta > 0, and for shapes that differ.
    """
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    logits = preference_logits(*logps)  # (B,)
    losses = -F.logsigmoid(beta * logits)  # (B,), Eq. 7
    return losses, *implicit_rewards(*logps, beta)


# ---- The gradient, by hand

def gradient_weight(chosen_rewards, rejected_rewards):
    """sigma(r^_l - r^_w), a pair's weight in the gradient, section 4. (B,)

    Near 1 where the rewards rank the pair wrongly, 1/2 for a tie,
    near 0 where they rank it rightly by a wide margin.
    """
    return torch.sigmoid(rejected_rewards - chosen_rewards)


def analytic_gradient(policy, batch, beta):
    """The gradient of the mean loss as section 4 writes it:

    -beta E[sigma(r^_l - r^_w) (grad log pi(y_w) - grad log pi(y_l))]

    It never goes through the loss. policy, batch: as in `pair_logps`,
    with ref_chosen_logps and ref_rejected_logps (B,) in the batch.
    Returns a list of tensors in the order of policy.parameters().
    """
    params = list(policy.parameters())
    chosen_logps, rejected_logps = pair_logps(policy, batch)  # (B,), (B,)
    ref = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    rewards = implicit_rewards(chosen_logps, rejected_logps, *ref, beta)  # (B,), (B,)
    weight = gradient_weight(*rewards)  # (B,)
    # sum_i weight_i grad log pi(y_i|x_i), for both
    grad_chosen = torch.autograd.grad(chosen_logps, params, weight, retain_graph=True)
    grad_rejected = torch.autograd.grad(rejected_logps, params, weight)
    return [-beta * (w - l) / len(weight) for w, l in zip(grad_chosen, grad_rejected)]


# ---- The gradient check: three ways to the same numbers, at three depths

def central_differences(f, x, eps=1e-5):
    """df/dx of a scalar f() that reads x. Each entry moves by eps, and back."""
    grad = torch.empty_like(x)
    flat, flat_grad = x.detach().view(-1), grad.view(-1)
    with torch.no_grad():
        for i in range(flat.numel()):
            old = flat[i].item()
            flat[i] = old + eps
            up = f().item()
            flat[i] = old - eps
            down = f().item()
            flat[i] = old
            flat_grad[i] = (up - down) / (2 * eps)
    return grad


def gradient_check(policy, batch, beta):
    """The analytic gradient, autograd, and central differences.

    policy, batch: as in `analytic_gradient`, in float64. Yields (name,
    shape, largest error against autograd, against differences, largest
    entry) of log pi(y_w|x), log pi(y_l|x), logits, each named parameter.
    """
    tokens, mask = batch["tokens"], batch["response_mask"]
    ref = batch["ref_chosen_logps"], batch["ref_rejected_logps"]

    def loss(chosen, rejected):
        return dpo_loss(chosen, rejected, *ref, beta)[0].mean()

    def row(name, x, analytic, f):
        autograd = torch.autograd.grad(f(), x)[0]
        differences = central_differences(f, x)
        errors = analytic - autograd, analytic - differences, analytic
        return name, tuple(x.shape), *(e.abs().max().item() for e in errors)

    # Level 1, the log-probabilities. For y_l the sign is the other.
    # dL/dlog pi(y_w) = -beta sigma(r^_l - r^_w) / B
    w, l = [t.detach().requires_grad_() for t in pair_logps(policy, batch)]  # (B,), (B,)
    weight = gradient_weight(*implicit_rewards(w, l, *ref, beta))  # (B,)
    coefficient = torch.cat([-beta * weight, beta * weight]) / len(weight)  # (2B,)
    d_chosen, d_rejected = coefficient.chunk(2)  # (B,), (B,)
    yield row("log pi(y_w|x)", w, d_chosen, lambda: loss(w, l))
    yield row("log pi(y_l|x)", l, d_rejected, lambda: loss(w, l))

    # Level 2, the logits that predict a response token.
    # d log softmax(z)[k] / dz = onehot(k) - softmax(z)
    z = policy(tokens).detach().requires_grad_()  # (2B, T, V)
    onehot = F.one_hot(tokens[:, 1:], z.size(-1))  # (2B, T-1, V)
    scale = coefficient[:, None] * mask[:, 1:]  # (2B, T-1)
    softmax = z.detach()[:, :-1].softmax(-1)  # (2B, T-1, V)
    d_z = torch.zeros_like(z)
    d_z[:, :-1] = scale[:, :, None] * (onehot - softmax)
    yield row("logits", z, d_z,
              lambda: loss(*response_logps(z, tokens, mask).chunk(2)))

    # Level 3, every parameter tensor.
    gradient = analytic_gradient(policy, batch, beta)
    for (name, p), analytic in zip(policy.named_parameters(), gradient):
        yield row(name, p, analytic, lambda: loss(*pair_logps(policy, batch)))


def main():
    """Print the gradient check of three pairs and a two-layer GPT."""
    from model import GPT, GPTConfig  # the functions above know no model
    from support.check import print_check
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # float32 is too coarse
    beta, vocab, start = 0.5, 11, 3
    lengths = torch.tensor([5, 2, 4, 3, 4, 5])  # 3 chosen, 3 rejected
    tokens = torch.randint(vocab, (6, start + 5))  # (2B, T)
    tokens[3:, :start] = tokens[:3, :start]  # a pair has one prompt
    position = torch.arange(start + 5)
    mask = (position >= start) & (position < start + lengths[:, None])  # (2B, T)
    config = GPTConfig(8, vocab, n_layer=2, n_head=2, n_embd=8)
    policy, reference = GPT(config), GPT(config)
    batch = {"tokens": tokens, "response_mask": mask}
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.2 * torch.randn_like(p))  # so that weights differ
        ref = pair_logps(reference, batch)
        _, *rewards = dpo_loss(*pair_logps(policy, batch), *ref, beta)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref
    rows = gradient_check(policy, batch, beta)
    print_check(rows, gradient_weight(*rewards), beta)


if __name__ == "__main__":
    main()
