"""Credit for single tokens: what each token of each response is worth, exactly.

The paper is From r to Q*, https://arxiv.org/abs/2404.12358. A state is a prompt with the first
tokens of a response. An action is the next token. The reward comes with the last token. So the
value of a whole response is its reward, and Q of a token is the value of the prefix that it ends.

As in world.py, a policy is the log-probabilities of N responses, logps (..., N) in float64, whose
probabilities sum to 1. It is the policy, given that it writes one of the N. T is the number of
tokens of the longest one. prefix (N, T+1), from `prefixes`, says which responses begin alike.
"""
import torch

import world
from support.tokenizers import get_tokenizer


def toy_sequences():
    """The tokens of every well-formed response of the toy world, EOS included. N lists."""
    tokenizer = get_tokenizer("toy")
    return [tokenizer.encode_ordinary(y) + [tokenizer.eot_token] for y in world.responses()]


def prefixes(sequences):
    """A number for each beginning of N token sequences. (N, T+1), integers from 0 to N-1

    Two sequences have the same number in column t if their first t tokens are the same, and only
    then. Behind its end a sequence stays what it is.
    """
    columns = []
    for t in range(max(map(len, sequences)) + 1):
        numbers = {}  # the first t tokens -> their number
        columns.append([numbers.setdefault(tuple(s[:t]), len(numbers)) for s in sequences])
    return torch.tensor(columns).T


def prefix_logps(logps, prefix):
    """log of the probability that a response begins so, for each prefix. (..., N) -> (..., N, T+1)

    It is a sum over all responses that begin so. logps may be any finite numbers: then this is the
    logarithm of the sum of their exponentials.
    """
    columns = []
    for number in prefix.unbind(-1):  # (N,)
        number = number.expand_as(logps)  # (..., N)
        low = torch.full_like(logps, -torch.inf)
        top = low.scatter_reduce(-1, number, logps, "amax").gather(-1, number)  # (..., N)
        terms = (logps - top).exp()  # at most 1, so nothing overflows
        total = torch.zeros_like(logps).scatter_add(-1, number, terms).gather(-1, number)
        columns.append(top + total.log())
    return torch.stack(columns, -1)  # (..., N, T+1)


def token_logps(logps, prefix):
    """log pi(y_t | x, y_<t) of each token, given one of the N responses. (..., N) -> (..., N, T)

    Behind the end of a response it is 0.
    """
    return prefix_logps(logps, prefix).diff(dim=-1)


def values(ref_logps, reward, beta, prefix):
    """The soft value V of each prefix: beta log E_ref[exp(r/beta) | prefix]. (..., N, T+1)

    ref_logps, reward: (..., N) each. Column 0 is V(s_0) = beta log Z, the last one is the reward.
    """
    weighted = prefix_logps(ref_logps + reward / beta, prefix)  # (..., N, T+1)
    return beta * (weighted - prefix_logps(ref_logps, prefix))


def advantages(ref_logps, reward, beta, prefix):
    """The soft advantage of each token, Q - V: the value after it minus the value before it.

    ref_logps, reward: (..., N) each -> (..., N, T). It is beta log(pi*/ref) of the token, and 0
    behind the end of a response.
    """
    return values(ref_logps, reward, beta, prefix).diff(dim=-1)
