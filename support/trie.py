"""Enumeration: a real transformer's probability of every response."""
from functools import lru_cache

import torch

import world
from support.tokenizers import get_tokenizer


@lru_cache(maxsize=1)
def toy_trie():
    tokenizer = get_tokenizer("toy")
    eos = [tokenizer.eot_token]
    return Trie([tokenizer.encode_ordinary(y) + eos for y in world.responses()])


def exact_logps(model, prompts):
    """log pi(y|x) of every well-formed response to every prompt, (P, N) float64. The model computes
    in the type of its weights, also in the middle of a training in bfloat16."""
    tokenizer = get_tokenizer("toy")
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        rows = [toy_trie().logps(model, tokenizer.encode_ordinary(x)) for x in prompts]
    return torch.stack(rows)


class Trie:
    """The distinct prefixes of N token sequences that end in EOS. Each is evaluated once.

    levels[d]: the distinct prefixes of d+1 tokens that go on, as two tensors (n_d,): the index of
        the prefix without its last token in the level before, and that last token.
    leaves[d]: where sequences of d+1 tokens end: the same two, and the number of the sequence.
    """

    def __init__(self, sequences):
        self.n = len(sequences)
        self.levels, self.leaves = [], []
        nodes = {(): 0}  # prefix -> its index in its level
        for d in range(max(map(len, sequences))):
            level, leaf, next_nodes = [], [], {}
            for which, s in enumerate(sequences):
                if len(s) <= d:
                    continue
                parent, prefix = nodes[tuple(s[:d])], tuple(s[:d + 1])
                if len(s) == d + 1:
                    leaf.append((parent, s[d], which))
                elif prefix not in next_nodes:
                    next_nodes[prefix] = len(level)
                    level.append((parent, s[d]))
            self.levels.append(torch.tensor(level, dtype=torch.long).reshape(-1, 2).t())
            self.leaves.append(torch.tensor(leaf, dtype=torch.long).reshape(-1, 3).t())
            nodes = next_nodes

    @torch.no_grad()
    def logps(self, model, prompt_ids):
        """log pi(y|x) of every sequence y after one prompt x, (N,) float64, on the CPU. The model's
        key/value cache is passed from each prefix to those that extend it."""
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        out = torch.zeros(self.n, dtype=torch.float64)  # (N,)
        cache = model.new_cache()
        logits = model(torch.tensor([prompt_ids], device=device), cache)[:, -1]  # (1, V)
        so_far = torch.zeros(len(logits), dtype=torch.float64)  # each prefix's log-probability
        for (parent, token), (leaf_parent, leaf_token, which) in zip(self.levels, self.leaves):
            next_logps = torch.log_softmax(logits.float(), -1).cpu()  # (n_{d-1}, V)
            out[which] = so_far[leaf_parent] + next_logps[leaf_parent, leaf_token]
            if len(parent) == 0:
                break
            so_far = so_far[parent] + next_logps[parent, token]  # (n_d,)
            origin = parent.to(device)  # (n_d,)
            cache = [(k.index_select(0, origin), v.index_select(0, origin)) for k, v in cache]
            logits = model(token[:, None].to(device), cache)[:, 0]  # (n_d, V)
        model.train(was_training)
        return out
