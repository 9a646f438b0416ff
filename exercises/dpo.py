"""Your dpo.py. Each function has its signature and its contract; what is missing is the function.

Fill in one, and see what the project's proofs say of it:    python -m pytest --impl exercises/dpo.py
The order of the file is a good order. B pairs, T tokens, V vocabulary. Equation numbers: https://arxiv.org/abs/2305.18290v3
"""
import torch
import torch.nn.functional as F


def token_logps(logits, tokens):
    """log p(tokens[:, t+1] | tokens[:, :t+1]) for every t.

    logits (B,T,V): a model's output for tokens (B,T). Returns (B,T-1), at least float32 whatever logits' precision:
    the log of a softmax in half precision is too coarse for a difference of sums.
    """
    raise NotImplementedError


def response_logps(logits, tokens, response_mask, average=False):
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t), the sum over the response's tokens that Eq. 7 needs.

    logits (B,T,V) for tokens (B,T); response_mask (B,T), boolean, true where tokens[b,t] is a response token (EOS
    included: a model must learn to stop), false on the prompt and on padding. Returns (B,); 0 for an empty mask.
    average: divide by the number of response tokens. That is another objective: no reward r corresponds to it through
    Eq. 5 (IPO's authors train with it; for DPO it is a known mistake).
    """
    raise NotImplementedError


def sequence_logps(policy, tokens, response_mask):
    """`response_logps(policy(tokens), tokens, response_mask)`, cheaper: the head runs only where a response token is predicted.

    policy: a model with hidden(tokens) -> (B,T,C) and head: (N,C) -> (N,V), as model.GPT. For GPT-2's 50,257 tokens the
    logits are by far the largest tensor of a step, and most of them belong to prompts and padding. Returns (B,).
    """
    raise NotImplementedError


def preference_logits(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    """h, what beta multiplies in Eq. 7: how much more the policy prefers chosen to rejected than the reference does. (B,)"""
    raise NotImplementedError


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
    raise NotImplementedError


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
    raise NotImplementedError


def gradient_weight(chosen_rewards, rejected_rewards):
    """sigma(r^_l - r^_w), the weight of a pair in the gradient (section 4): near 1 where the implicit reward ranks the pair
    wrongly, 1/2 where it sees no difference, near 0 where it ranks it rightly by a wide margin. (B,), (B,) -> (B,)"""
    raise NotImplementedError


def pair_logps(policy, batch):
    """log pi(y_w|x) and log pi(y_l|x) of a batch of pairs, each (B,).

    policy: a model.GPT, or any module that maps tokens (2B,T) to logits (2B,T,V). batch: a dict with tokens and
    response_mask, both (2B,T), the B chosen sequences first and then the B rejected ones: one forward pass for both.
    """
    raise NotImplementedError


def analytic_gradient(policy, batch, beta):
    """The gradient of the mean DPO loss as section 4 writes it, never through the loss:

        -beta E[ sigma(r^_l - r^_w) (grad log pi(y_w|x) - grad log pi(y_l|x)) ]

    policy: an nn.Module that maps tokens to logits. batch: a dict with tokens, response_mask (2B,T), chosen first, and
    ref_chosen_logps, ref_rejected_logps (B,). Returns a list of tensors, one a parameter, in the order of
    policy.parameters(). Autograd supplies only the two gradients of log-probabilities; the rest is this formula.
    """
    raise NotImplementedError


def central_differences(f, x, eps=1e-5):
    """df/dx for a scalar function f() of a tensor x that it reads, each entry moved by eps both ways. x's shape."""
    raise NotImplementedError


def gradient_check(policy, batch, beta):
    """The analytic gradient against autograd and against central differences, at the level of the log-probabilities, of
    the model's logits and of every parameter.

    policy, batch: as in `analytic_gradient`, in float64. Yields rows (name, shape, max |analytic - autograd|,
    max |analytic - differences|, max |analytic|) as they are ready.
    """
    raise NotImplementedError
