"""How good is a judge? A judge scores responses: a reward model, an AI, the true reward.

The measurements are exact. The pairs that a judge is tested on are two independent responses of the
grammar, and the labels follow Bradley and Terry, Eq. 1, with the true reward.
"""
from functools import lru_cache

import torch

import data
import world
from lab import tabular
from lab.credit import toy_sequences
from rlhf import UNFINISHED


def by_text(score):
    """A scoring function for rlhf.learn, from a function of texts such as world.true_reward."""
    tokenizer = data.get_tokenizer("toy")
    score = lru_cache(maxsize=None)(score)

    def scores(prompts, responses):
        values = []
        for x, y in zip(prompts, responses):
            ended = y[-1] == tokenizer.eot_token
            text = tokenizer.decode(y[:-1])
            values.append(score(tokenizer.decode(x), text) if ended else UNFINISHED)
        return torch.tensor(values)  # (B,)
    return scores


@torch.no_grad()
def all_scores(reward_model, prompts):
    """The score of every well-formed response to each prompt, (P,N) float64."""
    tokenizer, device = data.get_tokenizer("toy"), reward_model.scalar.weight.device
    responses = toy_sequences()
    rows = []
    for x in prompts:
        tokens, mask = data.pad([tokenizer.encode_ordinary(x)] * len(responses), responses)
        rows.append(reward_model(tokens.to(device), mask.to(device)))  # (N,)
    return torch.stack(rows).cpu().double()


def accuracy(grammar_logps, scores, reward):
    """How often a judge with these scores ranks a pair as its label does. A tie counts 1/2.

    (N,) each -> a scalar. For scores = reward it is world.label_ceiling.
    """
    p = grammar_logps.exp()  # (N,)
    prefers = 0.5 + 0.5 * torch.sign(scores[:, None] - scores[None, :])  # (N, N): 1, 0, or 1/2
    return 2 * p @ (prefers * tabular.preferences(reward)) @ p


def ranks(x):
    """The rank of each value. Equal values share their mean rank. (N,) -> (N,)"""
    _, place, count = torch.unique(x.round(decimals=9), return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place].double()


def spearman(a, b):
    """The rank correlation of two vectors. (N,), (N,) -> a scalar"""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]


def calibration(grammar_logps, scores, reward, bins=10):
    """Do pairs for which the judge says 70% get this label in 70% of the cases?

    The pairs are sorted into bins by the judge's probability, sigma(s_i - s_j). Returns three
    tensors (bins,): the mean of that probability in each bin, the mean of the true probability
    sigma(r_i - r_j), and the bin's share of the pairs.
    """
    p = grammar_logps.exp()  # (N,)
    weight = (p[:, None] * p[None, :]).flatten()  # (N*N,)
    predicted = tabular.preferences(scores).flatten()  # (N*N,)
    true = tabular.preferences(reward).flatten()  # (N*N,)
    which = (predicted * bins).long().clamp_(max=bins - 1)  # (N*N,)
    share, total_predicted, total_true = [
        torch.bincount(which, weights=values, minlength=bins)
        for values in (weight, weight * predicted, weight * true)]
    return total_predicted / share, total_true / share, share


def judge_quality(scores, prompts):
    """What a judge is worth on these prompts, means over them, a dict.

    scores (P,N): its score of every well-formed response to each prompt.
    """
    grammar = world.grammar_logps(prompts)  # (P, N)
    rewards = world.rewards(prompts, world.responses())  # (P, N)
    sums = {"accuracy": 0, "ceiling": 0, "spearman": 0}
    curves = []
    for p, s, r in zip(grammar, scores, rewards):
        sums["accuracy"] += accuracy(p, s, r).item()
        sums["ceiling"] += world.label_ceiling(p, r).item()
        sums["spearman"] += spearman(s, r).item()
        curves.append(torch.stack(calibration(p, s, r)))
    predicted, true, shares = torch.stack(curves, 1)  # (P, bins) each
    share = shares.mean(0)  # (bins,)
    # an empty bin of a prompt has no mean, and no weight
    predicted = (predicted * shares).nansum(0) / shares.sum(0)  # (bins,)
    true = (true * shares).nansum(0) / shares.sum(0)  # (bins,)
    error = ((predicted - true).abs() * share).nansum().item()
    return {name: value / len(prompts) for name, value in sums.items()} | {
        "calibration_error": error, "predicted": predicted.tolist(), "true": true.tolist(),
        "share": share.tolist()}
