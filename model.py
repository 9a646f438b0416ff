"""A GPT in one file: GPT-2's architecture in the layout of nanoGPT,
https://github.com/karpathy/nanoGPT, from which it departs in three points.

  - `forward` always returns the logits of every position. DPO scores whole responses.
  - `hidden` stops before the head, so that a caller runs the head only where it needs it.
  - A key/value cache serves `generate`, and support/trie.py, which scores all responses exactly.

Shapes in comments: B batch, T tokens, C channels (n_embd), H heads, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from support import gpt2
from support.prefixes import distinct_prefixes


@dataclass
class GPTConfig:
    block_size: int  # the longest sequence, in tokens
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}: "
                             "each head gets n_embd/n_head channels")


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, past=None, places=None):
        """x (B,T,C). past: this layer's earlier (keys, values), each (B,H,S,C/H), or None.
        places: the two tables of `distinct_prefixes`; then x is (N,C).
        Returns y, shaped as x, and all keys and values, the new ones included."""
        qkv = self.c_attn(x)  # (B, T, 3C), or (N, 3C)
        if places is not None:
            qkv = F.embedding(places[0], qkv)  # (B, T, 3C): attention is over whole sequences
        B, T, C = *qkv.shape[:2], x.size(-1)
        heads = B, T, self.n_head, C // self.n_head
        q, k, v = [z.view(heads).transpose(1, 2)  # each (B, H, T, C/H)
                   for z in qkv.split(C, dim=2)]
        if past is not None:
            k = torch.cat([past[0], k], dim=2)  # (B, H, S+T, C/H)
            v = torch.cat([past[1], v], dim=2)  # (B, H, S+T, C/H)
        S = k.size(2) - T
        # Query t stands at position S+t and sees the keys 0 to S+t. Without a past this is the
        # causal mask that PyTorch knows. A single new token sees everything and needs no mask.
        mask = None
        if S and T > 1:
            mask = torch.ones(T, S + T, dtype=torch.bool, device=x.device).tril(S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not S,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        if places is not None:
            y = F.embedding(places[1], y.view(B * T, C))  # (N, C)
        return self.resid_dropout(self.c_proj(y)), (k, v)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        # GPT-2's weights were trained with the tanh form of GELU
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, past=None, places=None):
        y, present = self.attn(self.ln_1(x), past, places)
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return x, present


class GPT(nn.Module):
    """Attributes: config; head, a Linear (C -> V) that shares its weight with the embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        # GPT-2's initialisation. The projections that write into the residual stream are smaller,
        # so that its variance does not grow with depth. GPT-2's std of 0.02 belongs to its width
        # of 768. Here it is scaled to the model's width: with 64 channels and 0.02, SFT ended
        # 0.024 nats from the grammar instead of 0.009, in one trial of 940 steps.
        std = 0.02 * math.sqrt(768 / config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer))
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # LayerNorm's gains are left; PyTorch starts them at 1
                nn.init.normal_(p, std=std)

    def new_cache(self):
        """An empty key/value cache, with an entry for each layer. It is filled in place."""
        return [None] * self.config.n_layer

    def hidden(self, idx, cache=None, needed=None):
        """Token ids idx (B,T) -> the states (B,T,C) that the head reads.

        With a cache, idx continues the tokens that the cache holds. needed (B,T) is true where a
        state is wanted; the others have no meaning then. What several rows begin with is then
        computed once, see `distinct_prefixes`.
        """
        past = 0 if cache is None or cache[0] is None else cache[0][0].size(2)
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit: this model was built for block_size="
                             f"{self.config.block_size}. Shorten the text, or build a model "
                             "with a larger block_size.")
        pos, places = torch.arange(past, end, device=idx.device), None  # (T,)
        if needed is not None:
            found = distinct_prefixes(idx, needed)
            idx, pos, *places = [t.to(self.wte.weight.device) for t in found]
        x = self.drop(self.wte(idx) + self.wpe(pos))  # (B, T, C); (N, C) with places
        for i, block in enumerate(self.h):
            x, present = block(x, None if cache is None else cache[i], places)
            if cache is not None:
                cache[i] = present
        x = self.ln_f(x)
        return x if places is None else F.embedding(places[0], x)  # (B, T, C)

    def forward(self, idx, cache=None):
        """Token ids idx (B,T) -> logits (B,T,V); logits[:, t] predict token t+1."""
        return self.head(self.hidden(idx, cache))  # (B, T, V)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, eos_id=None):
        """Continue each prompt by up to max_new_tokens tokens.

        prompts: B lists of token ids, of any lengths.
        temperature: 0 takes the likeliest token, 1 samples from the model, more is more random.
        top_k: sample only among the k likeliest tokens.
        eos_id: a response ends with its first eos_id, which it keeps.
        Returns a list of B lists: the new tokens of each prompt. The model keeps its mode.

        Generation starts at the end of the shortest prompt. A longer prompt is read to its end
        first. So nothing is padded on the left, and every token stands at its true position. A
        text that has ended leaves the batch.
        """
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("generate needs at least one prompt, and a token in each")
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or above")
        device, was_training = self.wte.weight.device, self.training
        lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
        start, end = int(lengths.min()), int(lengths.max()) + max_new_tokens
        if end > self.config.block_size:
            raise ValueError(f"the longest prompt ({int(lengths.max())} tokens) and "
                             f"max_new_tokens={max_new_tokens} make {end} tokens, "
                             f"more than block_size={self.config.block_size}")
        tokens = torch.zeros(len(prompts), end, dtype=torch.long, device=device)  # (B, end)
        for row, p in zip(tokens, prompts):
            row[:len(p)] = torch.tensor(p, device=device)
        rows = torch.arange(len(prompts), device=device)  # (b,): the texts that go on
        cache = self.new_cache()
        self.eval()
        read = 0  # how many tokens the cache holds already
        for t in range(start, end):
            logits = self.head(self.hidden(tokens[rows, read:t], cache)[:, -1])  # (b, V)
            read = t
            new = sample(logits, temperature, top_k)  # (b,)
            written = t >= lengths[rows]  # (b,): a longer prompt goes on with its own token
            tokens[rows, t] = torch.where(written, new, tokens[rows, t])
            done = t + 1 >= lengths[rows] + max_new_tokens  # (b,)
            if eos_id is not None:
                done |= written & (tokens[rows, t] == eos_id)
            if done.any():
                rows, cache = rows[~done], [(k[~done], v[~done]) for k, v in cache]
            if len(rows) == 0:
                break
        self.train(was_training)
        responses = []
        for row, length in zip(tokens.tolist(), lengths.tolist()):
            response = row[length:length + max_new_tokens]
            if eos_id in response:
                response = response[:response.index(eos_id) + 1]
            responses.append(response)
        return responses

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """GPT-2's weights, from a local folder as transformers writes it, or by name: "gpt2" (124M
        parameters), "gpt2-medium" (350M), "gpt2-large" (774M), "gpt2-xl" (1.6B). Raises ValueError
        where a folder is broken, or holds a model that this class does not compute."""
        folder = gpt2.find(name_or_folder)
        model = cls(GPTConfig(**gpt2.read_config(folder)))
        gpt2.copy_weights(folder, model)
        return model


def sample(logits, temperature=1.0, top_k=None):
    """One token for each row of logits (B,V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def response_logits(policy, tokens, response_mask):
    """For the N response tokens of a batch: the logits that predict them (N,V), in float32 at
    least, the tokens (N,), and the row of each (N,)."""
    # If tokens and mask are on the CPU, nothing below has to wait for a GPU.
    mask = response_mask[:, 1:].bool()  # (B, T-1)
    # What several rows begin with, as the responses to one prompt do, is computed once.
    states = policy.hidden(tokens[:, :-1], needed=mask)[mask]  # (N, C)
    logits = policy.head(states)  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, *[t.to(logits.device) for t in (tokens[:, 1:][mask], mask.nonzero()[:, 0])]


def row_logps(logits, targets, row, rows):
    """log pi(y|x) of each of the rows, from what `response_logits` returns. (rows,)"""
    logps = -F.cross_entropy(logits, targets, reduction="none")  # (N,)
    return logps.new_zeros(rows).index_add(0, row, logps)


def sequence_logps(policy, tokens, response_mask):
    """`dpo.response_logps(policy(tokens), tokens, response_mask)` at a lower price. (B,)

    For GPT-2 the logits are by far the largest tensor of a step, and most of them belong to the
    prompt and to padding. So the head runs only where a response token follows: policy.hidden gives
    states (B,T,C), policy.head maps them to logits. The result is float32 at least."""
    return row_logps(*response_logits(policy, tokens, response_mask), len(tokens))
