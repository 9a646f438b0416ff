"""A finished run as the files that transformers and TRL read: `python -m lab.export out/mine`.

The logits are the same there, and so are the tokens of a text, but for two things. "<|endoftext|>"
in a text is EOS there, unless the tokenizer is called with split_special_tokens=True. Here it is
text. And TRL makes tokens of prompt and response together, so that a token may hold a piece of
both. Here they are made apart. The pairs for which this makes a difference are counted.
"""
import argparse
import os
import tempfile
from pathlib import Path

from safetensors.torch import save_file

import data
from support import command, own_data
from support.files import write_json
from support.flags import writable
from support.preferences import save_preferences
from support.run import data_sha256, load_run
from support.tokenizers import EOS

# What \w is to tiktoken. To transformers "²" is one too, and a joiner is none.
WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"


def characters():
    """GPT-2's character for each byte, a dict. In tokenizer.json a token is text, not bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def merges(ranks):
    """All pairs of tokens that make a token, in the order in which tiktoken merges them, which is
    that of the tokens they make. ranks: {token, a character for each byte: its number}."""
    pairs = []
    for token in sorted(ranks, key=ranks.get):
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                pairs.append((token[:i], token[i:]))
    return pairs


def tokenizer_json(tokenizer):
    """The content of tokenizer.json for a tiktoken Encoding, a dict."""
    character, ranks = characters(), {}
    for token, rank in tokenizer._mergeable_ranks.items():
        ranks["".join(character[b] for b in token)] = rank
    split = {"type": "Split", "pattern": {"Regex": tokenizer._pat_str.replace(r"\w", WORD)},
             "behavior": "Isolated", "invert": False}
    raw = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    # ignore_merges: a piece of text that is a token becomes it at once, as in tiktoken
    model = {"type": "BPE", "ignore_merges": True, "vocab": ranks, "merges": merges(ranks)}
    special = {"id": tokenizer.eot_token, "content": EOS, "special": True, "single_word": False,
               "lstrip": False, "rstrip": False, "normalized": False}
    return {"version": "1.0", "model": model, "added_tokens": [special], "decoder": raw,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, raw]}}


def write_model(model, tokenizer, folder):
    """Write a model.GPT and its tokenizer into a new folder, as GPT-2 is published."""
    folder.mkdir(parents=True)
    c, eos = model.config, tokenizer.eot_token
    write_json({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32",
                "n_positions": c.block_size, "vocab_size": c.vocab_size, "n_layer": c.n_layer,
                "n_head": c.n_head, "n_embd": c.n_embd, "activation_function": "gelu_new",
                "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
                "bos_token_id": eos, "eos_token_id": eos}, folder / "config.json")
    tensors = {}
    for name, w in model.named_parameters():  # it lists the tied head once, as wte.weight
        # OpenAI's Conv1D stores (in, out) where nn.Linear stores (out, in)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w = w.t()
        tensors[f"transformer.{name}"] = w.detach().contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(tokenizer_json(tokenizer), folder / "tokenizer.json")
    write_json({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOS, "eos_token": EOS,
                "model_max_length": c.block_size}, folder / "tokenizer_config.json")


def pairs_of(flags, tokenizer):
    """{"train": the pairs that a run was trained on, as texts}, and "held_out" of a user's."""
    if flags["data"] is None:
        return {"train": data.make_preferences(flags["pairs"], flags["annotator"], flags["seed"])}
    if data_sha256(flags["data"]) != flags["data_sha256"]:
        raise data.DataError(f"{flags['data']} has changed since the run was trained on it. "
                             "Bring the old file back.")
    sides, _ = own_data.read(flags["data"], tokenizer, flags["max_length"], flags["seed"],
                             flags.get("skip_bad_rows", False))
    pairs = {}
    for side, examples in sides.items():
        tokens = [(e.prompt, e.chosen[:-1], e.rejected[:-1]) for e in examples]  # EOS is no text
        pairs[side.replace("-", "_")] = [data.Pair(*map(tokenizer.decode, t)) for t in tokens]
    return pairs


def differs_in_trl(pair, tokenizer):
    """Whether TRL makes other tokens of a pair than data.tokenize."""
    x, encode = pair.prompt, tokenizer.encode_ordinary
    both = pair.chosen, pair.rejected
    return any(EOS in x + y or encode(x + y) != encode(x) + encode(y) for y in both)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="folder of a finished run of train.py")
    parser.add_argument("--to", type=writable, metavar="DIR",
                        help="the folder to write, a new one (default: export, in the run)")
    args = parser.parse_args(argv)
    to = args.to or args.dir / "export"
    if to.exists():
        raise SystemExit(f"{to} is there already and is not overwritten. Choose another --to.")
    flags, tokenizer, models = load_run(args.dir)
    sides = pairs_of(flags, tokenizer)
    to.parent.mkdir(parents=True, exist_ok=True)
    # written beside and renamed, so that a half-written folder never has its name
    with tempfile.TemporaryDirectory(dir=to.parent) as beside:
        new = Path(beside) / "new"
        write_model(models["dpo"], tokenizer, new / "policy")
        write_model(models["sft"], tokenizer, new / "reference")
        for side, pairs in sides.items():
            save_preferences(pairs, new / f"{side}.jsonl")
        os.rename(new, to)
    for side, pairs in sides.items():
        other = sum(differs_in_trl(p, tokenizer) for p in pairs)
        print(f"{to / side}.jsonl: {len(pairs):,} pairs; of {other:,} TRL makes other tokens")
    print(f"""{to}: policy and reference, each with its tokenizer. Load them so:
  from transformers import AutoModelForCausalLM, AutoTokenizer
  policy = AutoModelForCausalLM.from_pretrained("{to.as_posix()}/policy")
  tokenizer = AutoTokenizer.from_pretrained("{to.as_posix()}/policy")""")


if __name__ == "__main__":
    command.run(main, again="Run it again.")
