"""Direct Preference Optimization: the paper in code, as pure functions on tensors.

    Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    https://arxiv.org/abs/2305.18290v3. Equation numbers below are this paper's unless another is named.

The story in five lines. RLHF looks for the policy that maximises E[r(x,y)] - beta KL(pi || ref)        (Eq. 3).
Its optimum is known: pi*(y|x) = ref(y|x) exp(r(x,y)/beta) / Z(x)                                       (Eq. 4).
Solved for the reward: r(x,y) = beta log(pi*(y|x)/ref(y|x)) + beta log Z(x)                             (Eq. 5).
Bradley-Terry needs only reward differences of one prompt, so the intractable Z(x) cancels              (Eq. 6).
What is left is a classification loss in the policy's own log-probabilities, no reward model, no RL     (Eq. 7).

Legend:  B pairs, T tokens, V vocabulary.
    policy_*_logps, ref_*_logps   (B,)   log pi(y|x), log ref(y|x), summed over the response's tokens, EOS included
    logits                        (B,)   h = [log pi(y_w) - log pi(y_l)] - [log ref(y_w) - log ref(y_l)], in the losses
    *_rewards                     (B,)   implicit rewards, beta log(pi/ref); beta is always included
    beta                                 how hard the policy is tied to the reference: a LARGER beta is a SHORTER leash,
                                         a smaller KL. It says which policy is the target, not how fast it is approached.

Run this file to check the gradient against autograd and against central differences:  python dpo.py
"""
import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------------------------
# Log-probabilities of responses


def token_logps(logits, tokens):
    """log p(tokens[:, t+1] | tokens[:, :t+1]) for every t.

    logits (B,T,V): a model's output for tokens (B,T). Returns (B,T-1), at least float32 whatever logits' precision:
    the log of a softmax in half precision is too coarse for a difference of sums.
    """
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be (B, T, V) for tokens (B, T) = {tuple(tokens.shape)}")
    logits = logits[:, :-1]                       # (B, T-1, V): the last position predicts a token that is not there
    targets = tokens[:, 1:]                       # (B, T-1):    the first token is predicted by nothing
    logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)    # (B, T-1, V)
    return logps.gather(2, targets.unsqueeze(2)).squeeze(2)                                           # (B, T-1)


def response_logps(logits, tokens, response_mask, average=False):
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t), the sum over the response's tokens that Eq. 7 needs.

    logits (B,T,V) for tokens (B,T); response_mask (B,T), boolean, true where tokens[b,t] is a response token (EOS
    included: a model must learn to stop), false on the prompt and on padding. Returns (B,); 0 for an empty mask.
    average: divide by the number of response tokens. That is another objective: no reward r corresponds to it through
    Eq. 5 (IPO's authors train with it; for DPO it is a known mistake).
    """
    if response_mask.shape != tokens.shape:
        raise ValueError(f"response_mask {tuple(response_mask.shape)} must have the shape of tokens {tuple(tokens.shape)}")
    mask = response_mask[:, 1:].bool()            # (B, T-1), aligned with token_logps: entry t is about token t+1
    logps = torch.where(mask, token_logps(logits, tokens), 0.0)                                       # (B, T-1)
    return logps.sum(-1) / mask.sum(-1).clamp(min=1) if average else logps.sum(-1)                    # (B,)


def sequence_logps(policy, tokens, response_mask):
    """`response_logps(policy(tokens), tokens, response_mask)`, cheaper: the head runs only where a response token is predicted.

    policy: a model with hidden(tokens) -> (B,T,C) and head: (N,C) -> (N,V), as model.GPT. For GPT-2's 50,257 tokens the
    logits are by far the largest tensor of a step, and most of them belong to prompts and padding. Returns (B,).
    """
    mask = response_mask[:, 1:].bool()                                                                # (B, T-1)
    logits = policy.head(policy.hidden(tokens)[:, :-1][mask])                                         # (N, V)
    logps = -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens[:, 1:][mask],
                             reduction="none")                                                        # (N,)
    row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(mask)[mask]              # (N,), whose token it is
    return torch.zeros(len(tokens), dtype=logps.dtype, device=logps.device).index_add(0, row, logps)  # (B,)


# --------------------------------------------------------------------------------------------------------------------
# The loss

def preference_logits(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    """h, what beta multiplies in Eq. 7: how much more the policy prefers chosen to rejected than the reference does. (B,)"""
    return (policy_chosen_logps - policy_rejected_logps) - (ref_chosen_logps - ref_rejected_logps)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
             beta=0.1, loss_type="sigmoid", label_smoothing=0.0):
    """The loss of each pair, and the implicit rewards.

    The four log-probabilities: (B,), from `response_logps`, the reference's without gradient.
    loss_type:
      "sigmoid"  DPO, Eq. 7. With label_smoothing = eps it is conservative DPO: the labels are believed to be flipped
                 with probability eps (https://ericmitchell.ai/cdpo.pdf, Eq. 3).
      "robust"   the unbiased form of the same belief, https://arxiv.org/abs/2403.00409: its mean over eps-flipped labels
                 is the DPO loss on clean ones. Needs label_smoothing < 1/2.
      "ipo"      a margin to reach instead of one to grow, https://arxiv.org/abs/2310.12036, Eq. 17; beta is its tau: a
                 smaller tau means a larger margin, 1/(2 tau). Log-probabilities are summed here; IPO's authors later
                 averaged them over tokens (pass `response_logps(..., average=True)` for that).
      "hinge"    max(0, 1 - beta h), https://arxiv.org/abs/2305.10425.
    Returns losses, chosen_rewards, rejected_rewards, each (B,); the rewards carry no gradient: they are for looking at.
    """
    shapes = {tuple(t.shape) for t in (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)}
    if len(shapes) > 1:                           # (B,) against (B,1) would broadcast to (B,B) and train on nonsense
        raise ValueError(f"the four log-probabilities must have one shape (B,), got {sorted(shapes)}")
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive: at beta = 0 nothing ties the policy to the reference")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 0.5): it is the share of flipped labels")
    if label_smoothing and loss_type in ("ipo", "hinge"):
        raise ValueError(f"label_smoothing is not defined for loss_type={loss_type!r}; use 'sigmoid' or 'robust'")

    logits = preference_logits(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)   # (B,)
    if loss_type == "sigmoid":                    # Eq. 7 at label_smoothing = 0
        losses = (-(1 - label_smoothing) * F.logsigmoid(beta * logits)
                  - label_smoothing * F.logsigmoid(-beta * logits))
    elif loss_type == "robust":
        losses = (-(1 - label_smoothing) * F.logsigmoid(beta * logits)
                  + label_smoothing * F.logsigmoid(-beta * logits)) / (1 - 2 * label_smoothing)
    elif loss_type == "ipo":
        losses = (logits - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * logits)
    else:
        raise ValueError(f"loss_type={loss_type!r} is none of 'sigmoid', 'ipo', 'hinge', 'robust'")

    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps).detach()          # r^ = beta log(pi/ref), section 4
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


def missing_mass(policy_logps, ref_logps):
    """What Eq. 7 does not see: an estimate of the probability that the policy spends outside the reference's support.

    Eq. 9 says that sum_y ref(y|x) exp(r^(x,y)/beta) = sum_y pi(y|x) = 1 when the sum runs over all y. Over the y that the
    reference writes it is the policy's mass on those y alone, E_{y ~ ref}[pi(y|x)/ref(y|x)], and 1 minus it is what went
    elsewhere. DPO constrains only differences of r^ within a prompt, so it lets this sum sink: log pi(y_w|x) and
    log pi(y_l|x) may both fall, to the profit of text that is in no pair.

    policy_logps, ref_logps: (B,), of responses that were drawn from the reference, preferred or not. Returns a scalar, for
    logging, or to add to the loss with a small weight: it is unbiased, and its expectation is least, 0, for pi* too,
    so unlike a likelihood term on the chosen response it does not move the optimum. Its variance grows with exp(KL); for
    long texts far from the reference, and for pairs that others wrote, it is no use.
    """
    return 1 - (policy_logps - ref_logps).exp().mean()


# --------------------------------------------------------------------------------------------------------------------
# The gradient, by hand

def gradient_weight(chosen_rewards, rejected_rewards):
    """sigma(r^_l - r^_w), the weight of a pair in the gradient (section 4): near 1 where the implicit reward ranks the pair
    wrongly, 1/2 where it sees no difference, near 0 where it ranks it rightly by a wide margin. (B,), (B,) -> (B,)"""
    return torch.sigmoid(rejected_rewards - chosen_rewards)


def pair_logps(policy, batch):
    """log pi(y_w|x) and log pi(y_l|x) of a batch of pairs, each (B,).

    policy: a model.GPT, or any module that maps tokens (2B,T) to logits (2B,T,V). batch: a dict with tokens and
    response_mask, both (2B,T), the B chosen sequences first and then the B rejected ones: one forward pass for both.
    """
    tokens, mask = batch["tokens"], batch["response_mask"]
    if hasattr(policy, "hidden"):
        logps = sequence_logps(policy, tokens, mask)                                                  # (2B,)
    else:
        logps = response_logps(policy(tokens), tokens, mask)                                          # (2B,)
    chosen, rejected = logps.chunk(2)                                                                 # (B,), (B,)
    return chosen, rejected


def analytic_gradient(policy, batch, beta):
    """The gradient of the mean DPO loss as section 4 writes it, never through the loss:

        -beta E[ sigma(r^_l - r^_w) (grad log pi(y_w|x) - grad log pi(y_l|x)) ]

    policy: an nn.Module that maps tokens to logits. batch: a dict with tokens, response_mask (2B,T), chosen first, and
    ref_chosen_logps, ref_rejected_logps (B,). Returns a list of tensors, one a parameter, in the order of
    policy.parameters(). Autograd supplies only the two gradients of log-probabilities; the rest is this formula.
    """
    params = list(policy.parameters())
    chosen_logps, rejected_logps = pair_logps(policy, batch)                                          # (B,), (B,)
    weight = gradient_weight(beta * (chosen_logps - batch["ref_chosen_logps"]).detach(),
                             beta * (rejected_logps - batch["ref_rejected_logps"]).detach())          # (B,)
    # sum_i weight_i grad log pi(y_i|x_i), for the chosen and for the rejected
    grad_chosen = torch.autograd.grad(chosen_logps, params, grad_outputs=weight, retain_graph=True)
    grad_rejected = torch.autograd.grad(rejected_logps, params, grad_outputs=weight)
    return [-beta * (w - l) / len(weight) for w, l in zip(grad_chosen, grad_rejected)]


# --------------------------------------------------------------------------------------------------------------------
# The gradient check: three ways to the same numbers, at three depths

def central_differences(f, x, eps=1e-5):
    """df/dx for a scalar function f() of a tensor x that it reads, each entry moved by eps both ways. x's shape."""
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
    """The analytic gradient against autograd and against central differences, at the level of the log-probabilities, of
    the model's logits and of every parameter.

    policy, batch: as in `analytic_gradient`, in float64. Yields rows (name, shape, max |analytic - autograd|,
    max |analytic - differences|, max |analytic|) as they are ready.
    """
    tokens, mask = batch["tokens"], batch["response_mask"]
    ref = batch["ref_chosen_logps"], batch["ref_rejected_logps"]

    def loss_of_logps(chosen, rejected):
        return dpo_loss(chosen, rejected, *ref, beta=beta)[0].mean()

    def loss_of_logits(logits):
        return loss_of_logps(*response_logps(logits, tokens, mask).chunk(2))

    def row(name, x, analytic, loss):
        autograd = torch.autograd.grad(loss(), x)[0]
        differences = central_differences(loss, x)
        return (name, tuple(x.shape), (analytic - autograd).abs().max().item(),
                (analytic - differences).abs().max().item(), analytic.abs().max().item())

    # Level 1, the log-probabilities: dL/dlog pi(y_w) = -beta sigma(r^_l - r^_w) / B, dL/dlog pi(y_l) = its negative.
    chosen, rejected = (t.detach().requires_grad_() for t in pair_logps(policy, batch))               # (B,), (B,)
    weight = gradient_weight(beta * (chosen - ref[0]), beta * (rejected - ref[1])).detach()           # (B,)
    coefficient = torch.cat([-beta * weight, beta * weight]) / len(weight)                            # (2B,)
    d_chosen, d_rejected = coefficient.chunk(2)
    loss = lambda: loss_of_logps(chosen, rejected)
    yield row("log pi(y_w|x)", chosen, d_chosen, loss)
    yield row("log pi(y_l|x)", rejected, d_rejected, loss)

    # Level 2, the logits: d log softmax(z)[k] / dz = onehot(k) - softmax(z), at positions that predict a response token.
    logits = policy(tokens).detach().requires_grad_()                                                 # (2B, T, V)
    onehot = F.one_hot(tokens[:, 1:], logits.size(-1))                                                # (2B, T-1, V)
    d_logits = torch.zeros_like(logits)
    d_logits[:, :-1] = (coefficient[:, None, None] * mask[:, 1:, None]
                        * (onehot - logits.detach()[:, :-1].softmax(-1)))
    yield row("logits", logits, d_logits, lambda: loss_of_logits(logits))

    # Level 3, every parameter tensor.
    loss = lambda: loss_of_logits(policy(tokens))
    for (name, p), analytic in zip(policy.named_parameters(), analytic_gradient(policy, batch, beta)):
        yield row(name, p, analytic, loss)


def main():
    from model import GPT, GPTConfig         # only here: the functions above know nothing of any model

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)   # differences of differences: float32 could not tell right from almost right
    beta, vocab, prompt_len, lengths = 0.5, 11, 3, torch.tensor([5, 2, 4, 3, 4, 5])   # 3 chosen, then 3 rejected
    tokens = torch.randint(vocab, (6, prompt_len + 5))                                                # (2B, T)
    tokens[3:, :prompt_len] = tokens[:3, :prompt_len]     # both responses of a pair answer the same prompt
    position = torch.arange(tokens.size(1))
    mask = (position >= prompt_len) & (position < prompt_len + lengths[:, None])                      # (2B, T)
    policy, reference = (GPT(GPTConfig(block_size=8, vocab_size=vocab, n_layer=2, n_head=2, n_embd=8)) for _ in "pr")
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.2 * torch.randn_like(p))             # away from the start, so that the pairs' weights differ
        batch = {"tokens": tokens, "response_mask": mask}
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = pair_logps(reference, batch)
        _, chosen_rewards, rejected_rewards = dpo_loss(*pair_logps(policy, batch), batch["ref_chosen_logps"],
                                                       batch["ref_rejected_logps"], beta=beta)
    weights = gradient_weight(chosen_rewards, rejected_rewards)

    print(f"The gradient of the DPO loss (Eq. 7) on {len(weights)} pairs, a 2-layer GPT, float64, beta = {beta}.")
    print("analytic:    -beta E[sigma(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l))]")
    print("             with the weights sigma(r_l - r_w) = " + ", ".join(f"{w:.3f}" for w in weights))
    print("autograd:    PyTorch's gradient of the loss itself")
    print("differences: [L(x + 1e-5) - L(x - 1e-5)] / 2e-5, for every entry\n")
    print(f"{'gradient with respect to':<26}{'shape':<13}{'largest':>9}{'vs autograd':>13}{'vs differences':>16}")
    failed = []
    for name, shape, autograd, differences, largest in gradient_check(policy, batch, beta):
        verdict = ("WRONG" if not (autograd <= 1e-9 and differences <= 1e-6)
                   else "exact" if autograd <= 1e-14 * max(1.0, largest) else "approximate")
        failed += [name] if verdict == "WRONG" else []
        print(f"{name:<26}{str(shape):<13}{largest:>9.1e}{autograd:>13.1e}{differences:>16.1e}  {verdict}", flush=True)
    print("\nColumns: the largest entry of the gradient, and the largest difference of any entry. exact: equal to autograd")
    print("within float64's rounding (1e-14). approximate: within 1e-9. Both: within 1e-6 of the differences, whose own")
    print("error is eps^2 = 1e-10 and the rounding of L divided by eps. Anything else is WRONG.")
    if failed:
        raise SystemExit(f"the gradient is wrong for {', '.join(failed)}: see which level is the first to differ")


if __name__ == "__main__":
    main()
