"""GPT-2's published weights, brought into the form of model.GPT."""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

NAMES = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


def find(name_or_folder):
    """A folder with config.json and model.safetensors: a local one, or one of NAMES, which is
    downloaded once, into torch.hub's folder."""
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    name = str(name_or_folder)
    if name not in NAMES:
        raise ValueError(f"{name!r} is neither a folder with config.json and model.safetensors "
                         f"nor one of {NAMES}")
    folder = Path(torch.hub.get_dir()) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            # this function writes beside the target and renames it when it is complete
            url = f"https://huggingface.co/openai-community/{name}/resolve/main/{file}"
            torch.hub.download_url_to_file(url, str(folder / file))
    return folder


def read_config(folder):
    """The arguments of model.GPTConfig that belong to the folder's weights."""
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {"block_size": hf["n_positions"], "vocab_size": hf["vocab_size"], "bias": True,
            "n_layer": hf["n_layer"], "n_head": hf["n_head"], "n_embd": hf["n_embd"]}


@torch.no_grad()
def copy_weights(folder, model):
    """Copy the folder's weights into a model.GPT. Raises ValueError, naming the tensor, where
    they do not fit it."""
    weights = {}
    for name, w in load_file(folder / "model.safetensors").items():
        weights[name.removeprefix("transformer.")] = w
    wanted = dict(model.named_parameters())  # it lists the tied head once, as wte.weight
    for name in weights:
        # GPT-2's files also hold its causal masks, and some of them hold the tied head
        known = name in wanted or name == "lm_head.weight"
        if not known and not name.endswith((".attn.bias", ".attn.masked_bias")):
            raise ValueError(f"{folder}: model.safetensors holds {name}, "
                             "for which config.json has no place")
    for name, p in wanted.items():
        if name not in weights:
            raise ValueError(f"{folder}: model.safetensors lacks the tensor {name}")
        w = weights[name]
        # OpenAI's Conv1D stores (in, out) where nn.Linear stores (out, in)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w = w.t()
        if w.shape != p.shape:
            raise ValueError(f"{folder}: tensor {name} has shape {tuple(w.shape)}, "
                             f"config.json makes it {tuple(p.shape)}")
        p.copy_(w)
