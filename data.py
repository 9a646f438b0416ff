"""From text to batches: tokenizers, the toy data set, users' files, padding.

Everything is tokenised as prompt + response + EOS, prompt and response separately, so that no token straddles the border
between what is given and what is scored. Masks come from lengths, never from token ids: padding is not a token of the
vocabulary (any id will do), and an EOS in the mask is an EOS in the text.
"""
import gzip
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import tiktoken
import torch

import world

EOS = "<|endoftext|>"


class DataError(ValueError):
    """A file that cannot be used as it is. The message names the file, the line, the value and what to do."""


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers, all of them tiktoken Encodings; encoding.eot_token is EOS.

def get_tokenizer(name):
    """"toy" (the toy world's words and all 256 bytes, built here, no network) or "gpt2" (tiktoken's own).

    tiktoken downloads the gpt2 vocabulary once (1.5 MB); with TIKTOKEN_CACHE_DIR set to a folder that holds it, never.
    """
    if name == "toy":
        return toy_tokenizer()
    if name != "gpt2":
        raise ValueError(f"tokenizer {name!r} is none of 'toy', 'gpt2'")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:          # requests' exceptions are OSErrors
        raise DataError(f"tiktoken could not download its gpt2 vocabulary ({type(error).__name__}). Connect once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer toy.") from error


@lru_cache(maxsize=None)
def toy_tokenizer():
    """A token for every byte, so that any text can be written, and one for every word of the toy world."""
    pattern = r" ?\w+|\s|[^\w\s]"     # a word takes the space before it along, as in GPT-2
    train, held_out = world.prompts()
    pieces = {piece for text in train + held_out + world.responses() for piece in world.re.findall(pattern, text)}
    ranks = {bytes([b]): b for b in range(256)}
    for piece in sorted(pieces):
        ranks.setdefault(piece.encode("utf-8"), len(ranks))
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOS: len(ranks)})


# --------------------------------------------------------------------------------------------------------------------
# The toy data: made once from a seed, then fixed.

@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: str
    rejected: str
    where: str = field(default="", compare=False)      # "file, line 3", for messages about this pair


def make_sft_corpus(n, seed):
    """n texts of the grammar, as (prompt, response): train prompts in turn, responses as likely as reviewers write them."""
    train, _ = world.prompts()
    texts = world.responses()
    prompt = torch.arange(n) % len(train)
    which = _draw(world.grammar_logps(train), prompt, torch.Generator().manual_seed(seed))
    return [(train[x], texts[y]) for x, y in zip(prompt.tolist(), which.tolist())]


def _draw(logps, prompt, generator):
    """For each prompt number (n,) a response number (n,), drawn from that prompt's row of logps (P,N)."""
    cdf = logps.exp().cumsum(-1)                                                                      # (P, N)
    u = torch.rand(len(prompt), generator=generator, dtype=torch.float64)
    out = torch.empty_like(prompt)
    for x in range(len(logps)):
        out[prompt == x] = torch.searchsorted(cdf[x], u[prompt == x] * cdf[x, -1])
    return out


def make_preferences(n, annotator="human", seed=0):
    """n preference pairs, a list of Pair: for a train prompt, two different responses of the grammar, compared once by an
    annotator of `world.ANNOTATORS` (Bradley-Terry, Eq. 1). The same n and seed give the same responses to compare,
    whoever compares them."""
    train, _ = world.prompts()
    texts, logps = world.responses(), world.grammar_logps(train)
    g = torch.Generator().manual_seed(seed)
    prompt = torch.arange(n) % len(train)
    first, second = _draw(logps, prompt, g), _draw(logps, prompt, g)
    while (same := first == second).any():             # nothing to prefer: draw again
        second[same] = _draw(logps, prompt[same], g)
    scores = world.rewards(train, texts, world.ANNOTATORS[annotator])
    p_first = world.preference_prob(scores[prompt, first], scores[prompt, second])
    first_wins = torch.rand(n, generator=g, dtype=torch.float64) < p_first
    chosen = torch.where(first_wins, first, second).tolist()
    rejected = torch.where(first_wins, second, first).tolist()
    return [Pair(train[x], texts[w], texts[l], f"toy pair {i}")
            for i, (x, w, l) in enumerate(zip(prompt.tolist(), chosen, rejected))]


def save_preferences(pairs, path):
    """Write pairs as JSONL, the format users bring and `load_preferences` reads. Refuses to overwrite a file."""
    with open(path, "x", encoding="utf-8", newline="\n") as f:
        for p in pairs:
            f.write(json.dumps({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------------------------------------
# Users' files

ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}      # the headings of Anthropic's HH dialogues
ANSWER = "\n\nAssistant:"


def load_preferences(path):
    """Every pair of a file, a list of Pair. Nothing is skipped, cut or changed.

    path: one JSON object a line (.jsonl, .jsonl.gz) or a JSON array of them (.json), UTF-8. Three forms of object:
      {"prompt": "...", "chosen": "...", "rejected": "..."}
      {"chosen": "...", "rejected": "..."}: both hold the whole dialogue; the prompt is what they have in common, up to the
          last "\\n\\nAssistant:" in it (as in Anthropic's HH) or else up to its last whole word
      messages: the same two forms, each text a list of {"role": "system" | "user" | "assistant", "content": "..."};
          written out as "\\n\\nHuman: ...\\n\\nAssistant: ..."
    Raises DataError naming file, line and value for anything else.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as f:
            text = f.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.object[error.start]:#04x} at position {error.start} is not UTF-8; "
                        "save the file as UTF-8") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".json")):
        raise DataError(f"{path}: the name must end in .jsonl, .jsonl.gz or .json, so that the format is known")

    if name.endswith(".jsonl"):                          # split on \n alone: JSON strings may hold other line separators
        rows = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, _json(line, where)) for where, line in rows]
    else:
        array = _json(text, str(path))
        if not isinstance(array, list):
            raise DataError(f"{path}: a .json file must hold an array of objects, this one holds {_show(array)}; "
                            "for one object a line, name it .jsonl")
        rows = [(f"{path}, item {i}", row) for i, row in enumerate(array, 1)]
    if not rows:
        raise DataError(f"{path}: holds no pairs")
    return [_pair(row, where) for where, row in rows]


def _json(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON, {error.msg} at character {error.pos + 1} of {_show(text)}") from error


def _show(value):
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _pair(row, where):
    if not isinstance(row, dict):
        raise DataError(f"{where}: {_show(row)} is not an object with prompt, chosen and rejected")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(f"{where}: no {key!r}; the keys are {sorted(row)}. Wanted: prompt, chosen, rejected")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _from_messages(prompt, chosen, rejected, where)
    for key, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str) and not (key == "prompt" and "prompt" not in row):
            raise DataError(f"{where}: {key} is {_show(value)}; wanted a text, or lists of messages for both answers")
    if prompt is None:
        prompt, chosen, rejected = _split_dialogue(chosen, rejected, where)
    for key, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not value.strip():
            raise DataError(f"{where}: {key} is empty ({value!r}); remove the row or fill it in")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise DataError(f"{where}: {key} holds half of a surrogate pair, which is no character: {_show(value)}")
    return Pair(prompt, chosen, rejected, where)


def _split_dialogue(chosen, rejected, where):
    """The whole dialogue twice -> prompt, chosen, rejected."""
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    common = chosen[:n]
    if ANSWER in common:
        n = common.rindex(ANSWER) + len(ANSWER)
    else:                                                # "the cat" and "the car" share "the", not "the ca"
        while n and not chosen[n - 1:n].isspace():
            n -= 1
        n = len(common[:n].rstrip())                     # the space belongs to the response
    if not n:
        raise DataError(f"{where}: no prompt, and chosen and rejected do not begin alike ({_show(chosen)}, {_show(rejected)}). "
                        "Give a prompt, or the whole dialogue in both")
    return chosen[:n], chosen[n:], rejected[n:]


def _from_messages(prompt, chosen, rejected, where):
    """Lists of messages -> three texts. A prompt given as text beside whole dialogues must be the last user message."""
    for messages in (chosen, rejected, prompt if isinstance(prompt, list) else []):
        for m in messages:
            if not (isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)):
                raise DataError(f"{where}: message {_show(m)}; wanted {{'role': one of {list(ROLES)}, 'content': text}}")
    if not isinstance(prompt, list):
        n = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)) - 1)
        if isinstance(prompt, str) and (n < 1 or chosen[n - 1]["content"] != prompt):
            raise DataError(f"{where}: prompt {_show(prompt)} is not the message before the two answers; "
                            "leave prompt out, or give it as a list of messages")
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise DataError(f"{where}: {key} must end in exactly one assistant message after the common prompt, "
                            f"got {_show(answer)}")
    if not prompt:
        raise DataError(f"{where}: no prompt message before the answers")
    text = "".join(f"\n\n{ROLES[m['role']]}: {m['content']}" for m in prompt) + ANSWER
    return text, " " + chosen[0]["content"], " " + rejected[0]["content"]


def leave_out_equal(pairs):
    """(usable, left out): a pair whose chosen is its rejected has loss ln 2 and gradient 0 whatever the policy does."""
    return [p for p in pairs if p.chosen != p.rejected], [p for p in pairs if p.chosen == p.rejected]


def split_by_prompt(pairs, held_out_share, seed):
    """(train, held out): all pairs of a prompt on the same side, or the held-out figures would measure memory."""
    names = sorted({p.prompt for p in pairs})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    n = round(held_out_share * len(names))
    if not 0 < n < len(names):
        raise DataError(f"{len(names)} different prompts cannot be split into train and {held_out_share:.0%} held out; "
                        "bring more prompts")
    held_out = {names[i] for i in order[:n]}
    return [p for p in pairs if p.prompt not in held_out], [p for p in pairs if p.prompt in held_out]


def load_split(path, seed, held_out_share=0.1):
    """A user's file -> (train pairs, held-out pairs, pairs left out because chosen is rejected)."""
    usable, equal = leave_out_equal(load_preferences(path))
    train, held_out = split_by_prompt(usable, held_out_share, seed)
    return train, held_out, equal


# --------------------------------------------------------------------------------------------------------------------
# Tokens and batches

@dataclass(frozen=True)
class Example:
    """A pair in tokens; chosen and rejected end in EOS."""
    prompt: list
    chosen: list
    rejected: list

    def __len__(self):
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def tokenize(pairs, tokenizer, max_length=None):
    """(examples, too long): the pairs in tokens, and those of which a sequence has more than max_length tokens. Cutting
    them would cut off EOS and teach the model never to stop, so they are handed back, not cut."""
    encode = lru_cache(maxsize=2 ** 16)(tokenizer.encode_ordinary)   # encode_ordinary: "<|endoftext|>" in a text is text
    examples, too_long = [], []
    for p in pairs:
        e = Example(encode(p.prompt), encode(p.chosen) + [tokenizer.eot_token], encode(p.rejected) + [tokenizer.eot_token])
        if max_length is not None and len(e) > max_length:
            too_long.append(p)
        else:
            examples.append(e)
    return examples, too_long


def pad(prompts, responses, pad_id=0):
    """Lists of token ids -> tokens (B,T) and response_mask (B,T), padded on the right to the longest row.

    The mask is true on the response's tokens. Under causal attention, padding on the right is seen by no real token.
    """
    rows = [p + r for p, r in zip(prompts, responses)]
    T = max(map(len, rows))
    tokens = torch.tensor([row + [pad_id] * (T - len(row)) for row in rows])                          # (B, T)
    start = torch.tensor([len(p) for p in prompts])[:, None]                                          # (B, 1)
    stop = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(T)
    return tokens, (position >= start) & (position < stop)                                            # (B, T)


def collate(examples, pad_id=0):
    """B examples -> {"tokens", "response_mask"}, each (2B,T): the B chosen sequences, then the B rejected ones."""
    tokens, mask = pad([e.prompt for e in examples] * 2,
                       [e.chosen for e in examples] + [e.rejected for e in examples], pad_id)
    return {"tokens": tokens, "response_mask": mask}


def batches(lengths, batch_size, seed, bucket=32):
    """One epoch's batches, lists of indices into lengths: every index once, in random order, like lengths together.

    Grouping happens within windows of 50 batches, by length in steps of `bucket` tokens, so that little is padding and
    the order is still random. Grouping by the exact length would be tidier and worse: on the toy data every batch would
    then hold reviews with the same modifiers, and the gradient would swing with the length of the batch. The last batch
    may be smaller. The same seed gives the same batches, which is what makes a run resumable.
    """
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=g).tolist()
    window = 50 * batch_size
    out = []
    for i in range(0, len(order), window):
        by_length = sorted(order[i:i + window], key=lambda j: lengths[j] // bucket)
        out += [by_length[j:j + batch_size] for j in range(0, len(by_length), batch_size)]
    return [out[i] for i in torch.randperm(len(out), generator=g).tolist()]
