"""A GPT in one file, small enough to read in one sitting.

The architecture is GPT-2's: token and learned position embeddings, then blocks of (pre-LayerNorm, causal
self-attention, residual) and (pre-LayerNorm, MLP, residual), a last LayerNorm, and a head that shares the token
embedding's weights. The layout follows nanoGPT (https://github.com/karpathy/nanoGPT), and departs from it in this:

  - `forward` returns the logits of every position, always. DPO scores whole responses.
  - `hidden` stops before the head, so that a caller may run the head only where it needs it.
  - a key/value cache, used by `generate` and by world.py, which scores every possible response exactly.

Shapes in comments: B batch, T tokens, C channels (n_embd), H heads, V vocabulary.
"""
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    block_size: int = 32        # the longest sequence, in tokens
    vocab_size: int = 320
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0
    bias: bool = True           # biases in Linear and LayerNorm, as GPT-2 has them

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}: "
                             f"each head gets n_embd/n_head channels")


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, past=None):
        """x (B,T,C); past: this layer's earlier (keys, values), each (B,H,S,C/H). Returns y (B,T,C) and all keys, values."""
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)     # each (B, H, T, C/H)
                   for z in self.c_attn(x).split(C, dim=2))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, H, S+T, C/H)
        S = k.size(2) - T
        # Query t stands at position S+t and sees keys 0..S+t. With no past that is SDPA's own causal mask;
        # a single new token sees everything and needs no mask.
        mask = torch.ones(T, S + T, dtype=torch.bool, device=x.device).tril(S) if S and T > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not S,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)                                     # heads side by side again
        return self.resid_dropout(self.c_proj(y)), (k, v)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")      # the tanh form is the one GPT-2's weights were trained with
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        y, present = self.attn(self.ln_1(x), past)
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return x, present


class GPT(nn.Module):
    """Attributes: config; head, a Linear (C -> V) that shares its weight with the token embedding."""

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
        # GPT-2's initialisation: normal weights, zero biases, and the projections that write into the residual stream
        # shrunk, so that its variance does not grow with depth. GPT-2's std of 0.02 belongs to its width of 768; here it
        # is scaled to the width at hand: a 64-channel model begun at 0.02 is slower to read the prompt. In one trial, 940
        # steps of SFT on the toy world ended 0.024 nats from the grammar instead of 0.009.
        std = 0.02 * math.sqrt(768 / config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer))
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:                # what is left are LayerNorm's gains, which PyTorch starts at 1
                nn.init.normal_(p, std=std)

    def new_cache(self):
        """An empty key/value cache for `hidden` and `forward`: a list with an entry a layer, filled in place."""
        return [None] * self.config.n_layer

    def hidden(self, idx, cache=None):
        """Token ids idx (B,T) -> the states (B,T,C) that the head reads. With a cache, idx continues what it holds."""
        past = 0 if cache is None or cache[0] is None else cache[0][0].size(2)
        if past + idx.size(1) > self.config.block_size:
            raise ValueError(f"{past + idx.size(1)} tokens do not fit: this model was built for block_size="
                             f"{self.config.block_size}. Shorten the text or build a model with a larger block_size.")
        pos = torch.arange(past, past + idx.size(1), device=idx.device)           # (T,)
        x = self.drop(self.wte(idx) + self.wpe(pos))                              # (B, T, C)
        for i, block in enumerate(self.h):
            x, present = block(x, None if cache is None else cache[i])
            if cache is not None:
                cache[i] = present
        return self.ln_f(x)                                                       # (B, T, C)

    def forward(self, idx, cache=None):
        """Token ids idx (B,T) -> logits (B,T,V); logits[:, t] predict token t+1."""
        return self.head(self.hidden(idx, cache))                                 # (B, T, V)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, eos_id=None, use_cache=True):
        """Continue each prompt by up to max_new_tokens tokens.

        idx: the prompts, a (B,T) tensor or, where lengths differ, a list of B lists of token ids.
        temperature: 0 takes the likeliest token; 1 samples from the model; larger is more random.
        top_k: sample only among the k likeliest tokens. eos_id: a response ends with the first eos_id, kept in it.
        Returns a list of B lists: the new tokens of each prompt, without the prompt.

        Prompts of different lengths need no padding on the left: the batch starts at the shortest prompt's end, and a
        row whose prompt is longer is fed its own next prompt token until the prompt is used up. Every token thus stands
        at its true position and sees only true tokens. The model generates in eval mode and is put back as it was.
        """
        prompts = idx.tolist() if torch.is_tensor(idx) else [list(p) for p in idx]
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("generate needs at least one prompt, and at least one token in each: a model with nothing "
                             "to read has no distribution over the next token")
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or above")
        device, was_training = self.wte.weight.device, self.training
        lengths = torch.tensor([len(p) for p in prompts], device=device)          # (B,)
        start, end = int(lengths.min()), int(lengths.max()) + max_new_tokens
        if end > self.config.block_size:
            raise ValueError(f"the longest prompt ({int(lengths.max())} tokens) and max_new_tokens={max_new_tokens} make "
                             f"{end} tokens, more than block_size={self.config.block_size}")
        tokens = torch.zeros(len(prompts), end, dtype=torch.long, device=device)  # (B, end)
        for row, p in zip(tokens, prompts):
            row[:len(p)] = torch.tensor(p, device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        cache = self.new_cache() if use_cache else None
        self.eval()
        read = 0                                                                  # tokens the cache already holds
        for t in range(start, end):
            logits = self.head(self.hidden(tokens[:, read:t], cache)[:, -1])      # (B, V), predicts token t
            read = t if use_cache else 0
            new = sample(logits, temperature, top_k)                              # (B,)
            tokens[:, t] = torch.where(t < lengths, tokens[:, t], new)
            if eos_id is not None:
                done |= (t >= lengths) & (tokens[:, t] == eos_id)
            if (done | (t + 1 >= lengths + max_new_tokens)).all():
                break
        self.train(was_training)
        responses = [row[n:n + max_new_tokens] for row, n in zip(tokens.tolist(), lengths.tolist())]
        return [r[:r.index(eos_id) + 1] if eos_id in r else r for r in responses]

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """GPT-2's weights: a local folder with config.json and model.safetensors, or a name on the Hugging Face hub.

        Names: "gpt2" (124M parameters), "gpt2-medium" (350M), "gpt2-large" (774M), "gpt2-xl" (1.6B). They are downloaded
        once, into torch.hub's folder. Raises ValueError, naming the tensor, where folder and architecture do not fit.
        """
        from safetensors.torch import load_file
        folder = Path(name_or_folder)
        if not folder.is_dir():
            folder = _download_gpt2(str(name_or_folder))
        hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = cls(GPTConfig(block_size=hf["n_positions"], vocab_size=hf["vocab_size"], n_layer=hf["n_layer"],
                              n_head=hf["n_head"], n_embd=hf["n_embd"], dropout=dropout, bias=True))
        weights = {name.removeprefix("transformer."): w for name, w in load_file(folder / "model.safetensors").items()}
        known = dict(model.named_parameters())           # lists the tied head once, as wte.weight
        masks = (".attn.bias", ".attn.masked_bias")      # GPT-2's files hold its causal masks, and some the tied head
        unknown = [name for name in weights if name not in known and name != "lm_head.weight" and not name.endswith(masks)]
        if unknown:
            raise ValueError(f"{folder}: model.safetensors holds {unknown[0]}, for which config.json has no place")
        for name, p in known.items():
            if name not in weights:
                raise ValueError(f"{folder}: model.safetensors lacks the tensor {name}")
            w = weights[name]
            # OpenAI's Conv1D stores (in, out) where nn.Linear stores (out, in)
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                w = w.t()
            if w.shape != p.shape:
                raise ValueError(f"{folder}: tensor {name} has shape {tuple(w.shape)}, "
                                 f"config.json makes it {tuple(p.shape)}")
            with torch.no_grad():
                p.copy_(w)
        return model


def sample(logits, temperature=1.0, top_k=None):
    """One token for each row of logits (B,V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]             # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def atomic_save(obj, path):
    """torch.save that leaves either the old file or the whole new one, never half of one, wherever it is interrupted."""
    path = Path(path)
    beside = path.with_name(path.name + ".writing")
    torch.save(obj, beside)
    os.replace(beside, path)


def save_model(model, path, **facts):
    """Write a checkpoint: the model's config and weights, and facts about it (plain values)."""
    weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items() if k != "head.weight"}    # tied: once
    atomic_save({"config": asdict(model.config), "weights": weights, "facts": facts}, path)


def load_model(path, device="cpu"):
    """A checkpoint of `save_model` -> (model, facts). Raises ValueError where the file is not one."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)      # weights_only: a checkpoint runs no code
        model = GPT(GPTConfig(**saved["config"]))
        model.load_state_dict(saved["weights"] | {"head.weight": saved["weights"]["wte.weight"]})
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint that this project can read: {error}") from error
    return model.to(device), saved["facts"]


def _download_gpt2(name):
    names = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    if name not in names:
        raise ValueError(f"{name!r} is neither a folder with config.json and model.safetensors nor one of {names}")
    folder = Path(torch.hub.get_dir()) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():     # download_url_to_file writes beside the target and renames it when complete
            url = f"https://huggingface.co/openai-community/{name}/resolve/main/{file}"
            torch.hub.download_url_to_file(url, str(folder / file))
    return folder
