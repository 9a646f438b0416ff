"""Your own DPO. Each function has a signature, and a docstring says what it must do.

Write one function, and see what the project's proofs say about it:

    python -m pytest --impl exercises/dpo.py

Begin at the top. A function uses only functions that stand before it. No function changes its
arguments; central_differences moves x, and puts it back. float64 stays float64. Where a ValueError
is asked for, its wording is yours.

B pairs, T tokens, V vocabulary, C channels. h is what preference_logits returns, sigma is the
logistic function, and all logarithms are in nats. The equation numbers are those of
https://arxiv.org/abs/2305.18290v3.
"""
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401

# ---- Log-probabilities of responses

def token_logps(logits, tokens):
    """log p(tokens[:, t+1] | tokens[:, :t+1]) for every t.

    logits (B,T,V): a model's output for tokens (B,T).
    Returns (B,T-1), in float32 at least (float64 stays): half precision
    is too coarse for sums. Raises ValueError for shapes that differ.
    """
    raise NotImplementedError


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
    raise NotImplementedError


def sequence_logps(policy, tokens, response_mask):
    """`dpo.response_logps(policy(tokens), tokens, response_mask)` at a lower price. (B,)

    For GPT-2 the logits are by far the largest tensor of a step, and most of them belong to the
    prompt and to padding. So the head runs only where a response token follows: policy.hidden gives
    states (B,T,C), policy.head maps them to logits. The result is float32 at least."""
    raise NotImplementedError


def pair_logps(policy, batch):
    """log pi(y_w|x) and log pi(y_l|x) of a batch of pairs. (B,), (B,)

    policy: a module, tokens (2B,T) -> logits (2B,T,V); it runs once.
    batch: a dict with tokens and response_mask (2B,T), chosen first.
    """
    raise NotImplementedError


# ---- The loss

def preference_logits(policy_chosen_logps, policy_rejected_logps,
                      ref_chosen_logps, ref_rejected_logps):
    """h, what beta multiplies in Eq. 7: how much more the policy
    prefers chosen to rejected than the reference does. (B,)

    Raises ValueError where shapes differ: (B,) beside (B,1) would
    broadcast to (B,B) pairs that do not exist.
    """
    raise NotImplementedError


def implicit_rewards(policy_chosen_logps, policy_rejected_logps,
                     ref_chosen_logps, ref_rejected_logps, beta):
    """r^(x,y) = beta log(pi(y|x)/ref(y|x)), section 4, of both. (B,), (B,)

    They carry no gradient: they are for looking at. Raises ValueError
    unless beta > 0 (nan is not): nothing would tie the policy.
    """
    raise NotImplementedError


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """The DPO loss of each pair, Eq. 7, and its implicit rewards.

    The log-probabilities (B,) come from `response_logps`.
    Returns losses, chosen_rewards and rejected_rewards, each (B,).
    Raises ValueError unless beta > 0, and for shapes that differ.
    """
    raise NotImplementedError


# ---- The gradient, by hand

def gradient_weight(chosen_rewards, rejected_rewards):
    """sigma(r^_l - r^_w), a pair's weight in the gradient, section 4. (B,)

    Near 1 where the rewards rank the pair wrongly, 1/2 for a tie,
    near 0 where they rank it rightly by a wide margin.
    """
    raise NotImplementedError


def analytic_gradient(policy, batch, beta):
    """The gradient of the mean loss as section 4 writes it:

    -beta E[sigma(r^_l - r^_w) (grad log pi(y_w) - grad log pi(y_l))]

    It never goes through the loss. policy, batch: as in `pair_logps`,
    with ref_chosen_logps and ref_rejected_logps (B,) in the batch.
    Returns a list of tensors in the order of policy.parameters().
    """
    raise NotImplementedError


# ---- The gradient check: three ways to the same numbers

def central_differences(f, x, eps=1e-5):
    """df/dx of a scalar f() that reads x. Each entry moves by eps, and back."""
    raise NotImplementedError


def gradient_check(policy, batch, beta):
    """The analytic gradient, autograd, and central differences.

    policy, batch: as in `analytic_gradient`, in float64. Yields (name,
    shape, largest error against autograd, against differences, largest
    entry) of log pi(y_w|x), log pi(y_l|x), logits, each named parameter.
    """
    raise NotImplementedError


# ---- Variants of the loss. Each is called as dpo_loss is, returns what it
# returns, and raises a ValueError where it does.

def cdpo_loss(policy_chosen_logps, policy_rejected_logps,
              ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    """Conservative DPO: -(1 - eps) log sigma(beta h) - eps log sigma(-beta h).

    eps = label_smoothing is the share of labels that are believed to be flipped. The loss stops
    at beta h = log((1 - eps)/eps). https://ericmitchell.ai/cdpo.pdf, Eq. 3.
    Raises ValueError for label_smoothing outside [0, 0.5).
    """
    raise NotImplementedError


def robust_loss(policy_chosen_logps, policy_rejected_logps,
                ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    """Robust DPO: [-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps).

    Its mean over labels, of which the share eps = label_smoothing is flipped, is the DPO loss on
    clean labels: it is unbiased. https://arxiv.org/abs/2403.00409.
    Raises ValueError for label_smoothing outside [0, 0.5).
    """
    raise NotImplementedError


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """IPO: (h - 1/(2 beta))^2, a margin to reach instead of a margin to grow.

    beta is the tau of the paper: a smaller tau asks for a larger margin, 1/(2 tau).
    Log-probabilities are summed here. IPO's authors later averaged them over tokens; pass
    `response_logps(..., average=True)` for that. https://arxiv.org/abs/2310.12036, Eq. 17.
    """
    raise NotImplementedError


def hinge_loss(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """RSO's hinge: max(0, 1 - beta h). It stops at the margin 1/beta.

    It is called hinge-norm in https://arxiv.org/abs/2309.06657, and beta is the gamma of that
    paper. The hinge of SLiC-HF, https://arxiv.org/abs/2305.10425, has no log-ratio to a reference.
    """
    raise NotImplementedError


# ---- What the loss does not see

def missing_mass(policy_logps, ref_logps):
    """An estimate of the probability that the policy spends on text the reference does not write.

    Eq. 9 says sum_y ref(y|x) exp(r^(x,y)/beta) = sum_y pi(y|x) = 1. Over the text that the
    reference writes, the sum is E_{y ~ ref}[pi(y|x)/ref(y|x)], the policy's mass on that text.
    1 minus it went elsewhere.

    policy_logps, ref_logps (B,): of responses drawn from the reference, chosen and rejected.
    Returns a scalar. For such responses it is unbiased, and its expectation is least, 0, for pi*
    too. For responses that others wrote it is biased. Its variance grows as exp(KL), and so it is
    a poor term of a loss where beta is small.
    """
    raise NotImplementedError
