"""From text to batches: the toy data, tokens, masks and padding.

Prompt and response are tokenised apart, so that no token holds a piece of both, and a response
ends in EOS. Masks are made from lengths, never from token ids: any id will do for padding.
"""
from dataclasses import dataclass, field

import numpy as np
import torch

import world
from support.preferences import DataError, places, read_rows  # noqa: F401, for whoever imports data
from support.tokenizers import get_tokenizer  # noqa: F401

# ---- The toy data: made once from a seed, then fixed

@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: str
    rejected: str
    where: str = field(default="", compare=False)  # "file, line 3", for messages about this pair


def load_preferences(path):
    """Every pair of a user's file, a list of Pair. See support/preferences.py for the forms."""
    return [Pair(*texts, f"{path}, {places(path, [n])}") for n, *texts in read_rows(path)]


def draw(logps, prompt, generator):
    """For each prompt number (n,) a response number (n,), drawn from its row of logps (P,N)."""
    cdf = logps.exp().cumsum(-1)  # (P, N)
    u = torch.rand(len(prompt), generator=generator, dtype=torch.float64)  # (n,)
    out = torch.empty_like(prompt)
    for x in range(len(logps)):
        here = prompt == x
        out[here] = torch.searchsorted(cdf[x], u[here] * cdf[x, -1])
    return out


def make_sft_corpus(n, seed):
    """n texts of the grammar for the train prompts, in turn: a list of (prompt, response)."""
    train, texts = world.prompts()[0], world.responses()
    prompt = torch.arange(n) % len(train)  # (n,)
    generator = torch.Generator().manual_seed(seed)
    which = draw(world.grammar_logps(train), prompt, generator)  # (n,)
    return [(train[x], texts[y]) for x, y in zip(prompt.tolist(), which.tolist())]


def make_preferences(n, annotator="human", seed=0):
    """n preference pairs, a list of Pair, for the train prompts in turn.

    The grammar writes two different responses. An annotator of `world.ANNOTATORS` compares them
    once, Eq. 1. The same n and seed give the same responses, whoever compares them.
    """
    train, _ = world.prompts()
    texts, logps = world.responses(), world.grammar_logps(train)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.arange(n) % len(train)  # (n,)
    first = draw(logps, prompt, generator)  # (n,)
    second = draw(logps, prompt, generator)  # (n,)
    while (same := first == second).any():  # there is nothing to prefer: draw again
        second[same] = draw(logps, prompt[same], generator)
    scores = world.rewards(train, texts, world.ANNOTATORS[annotator])  # (P, N)
    p_first = world.preference_prob(scores[prompt, first], scores[prompt, second])  # (n,)
    first_wins = torch.rand(n, generator=generator, dtype=torch.float64) < p_first
    chosen = torch.where(first_wins, first, second)
    rejected = torch.where(first_wins, second, first)
    return [Pair(train[x], texts[w], texts[l], f"toy pair {i}") for i, (x, w, l)
            in enumerate(torch.stack([prompt, chosen, rejected], 1).tolist())]


# ---- Tokens and batches

@dataclass(frozen=True)
class Example:
    """A pair in tokens. chosen and rejected end in EOS."""
    prompt: list
    chosen: list
    rejected: list

    def __len__(self):
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def tokenize(pairs, tokenizer, max_length=None):
    """(examples, too long): the pairs in tokens, and the pairs with more than max_length tokens.

    Long pairs are handed back. Cutting them would cut off EOS and teach the model never to stop.
    """
    encode = tokenizer.encode_ordinary  # it reads "<|endoftext|>" in a text as text
    eos, examples, too_long = [tokenizer.eot_token], [], []
    for p in pairs:
        example = Example(encode(p.prompt), encode(p.chosen) + eos, encode(p.rejected) + eos)
        if max_length is not None and len(example) > max_length:
            too_long.append(p)
        else:
            examples.append(example)
    return examples, too_long


def pad(prompts, responses, pad_id=0):
    """Lists of token ids -> tokens (B,T) and response_mask (B,T), padded to the longest row.

    The mask is true on the response. Under causal attention no real token sees the padding.
    """
    rows = [p + r for p, r in zip(prompts, responses)]
    T = max(map(len, rows))
    padded = np.array([row + [pad_id] * (T - len(row)) for row in rows])  # faster than torch.tensor
    tokens = torch.from_numpy(padded)  # (B, T)
    start = torch.tensor([len(p) for p in prompts])[:, None]  # (B, 1)
    stop = torch.tensor([len(row) for row in rows])[:, None]  # (B, 1)
    position = torch.arange(T)  # (T,)
    return tokens, (position >= start) & (position < stop)  # (B, T)


def collate(examples, pad_id=0, device=None):
    """B examples -> {"tokens", "response_mask"}, each (2B,T): the B chosen sequences first, then
    the B rejected ones."""
    prompts = [e.prompt for e in examples] * 2
    responses = [e.chosen for e in examples] + [e.rejected for e in examples]
    tokens, mask = pad(prompts, responses, pad_id)
    return {"tokens": tokens.to(device), "response_mask": mask.to(device)}


def batches(lengths, batch_size, seed, bucket=32):
    """One epoch's batches, lists of indices into lengths. Every index comes once, in random order.

    Within windows of 50 batches, indices are sorted by length in steps of `bucket` tokens, so that
    little is padding. The toy texts all fall into one bucket. The last batch may be smaller.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = 50 * batch_size
    out = []
    for i in range(0, len(order), window):
        by_length = sorted(order[i:i + window], key=lambda j: lengths[j] // bucket)
        for j in range(0, len(by_length), batch_size):
            out.append(by_length[j:j + batch_size])
    return [out[i] for i in torch.randperm(len(out), generator=generator).tolist()]


def epochs(lengths, batch_size, seed, n):
    """The batches of n epochs, one after the other, each epoch in another order."""
    return [batch for epoch in range(n)
            for batch in batches(lengths, batch_size, seed * 1000 + epoch)]
