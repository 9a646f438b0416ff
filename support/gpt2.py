"""GPT-2's weights as they are published, brought into the form of model.GPT."""
import json
from pathlib import Path

import torch

# The published models: (n_layer, n_embd).
GPT2 = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280),
        "gpt2-xl": (48, 1600)}
# Where the weights may stand. The first that a folder holds is read. An index names several files.
FILES = ["model.safetensors", "model.safetensors.index.json",
         "pytorch_model.bin", "pytorch_model.bin.index.json"]
SIZES = ["n_positions", "vocab_size", "n_layer", "n_head", "n_embd"]
# What model.GPT computes. Where config.json leaves a key out, it means the first value.
COMPUTED = {
    "model_type": ["gpt2"], "auto_map": [None], "quantization_config": [None],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu_accurate"],  # one function
    "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False],
}


def find(name_or_folder):
    """A folder with config.json and one of FILES: a local one, or one of GPT2, which is
    downloaded once, into torch.hub's folder."""
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    name = str(name_or_folder)
    if name not in GPT2:
        raise ValueError(f"{name!r} is neither a folder with config.json and model.safetensors "
                         f"nor one of {list(GPT2)}")
    folder = Path(torch.hub.get_dir()) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            # this function writes beside the target and renames it when it is complete
            url = f"https://huggingface.co/openai-community/{name}/resolve/main/{file}"
            torch.hub.download_url_to_file(url, str(folder / file))
    return folder


def read(file):
    """What a file holds, a dict. Raises ValueError, naming the file, where it is none."""
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
        else:  # torch reads safetensors too; with weights_only, a pickle cannot run code
            content = torch.load(file, map_location="cpu", weights_only=True)
        return {str(name): value for name, value in content.items()}
    except Exception as error:  # each library has its own exceptions for a broken file
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{file} cannot be read ({reason}). Download it again.") from error


def read_config(folder):
    """The arguments of model.GPTConfig that belong to the folder's weights. Raises ValueError,
    naming key and value, where model.GPT does not compute what config.json says."""
    file = folder / "config.json"
    hf = read(file)
    for key in SIZES:
        if type(hf.get(key)) is not int or hf[key] < 1:
            raise ValueError(f"{file}: {key} is {hf.get(key)!r}, wanted a whole number above 0")
    computed = COMPUTED | {"n_inner": [None, 4 * hf["n_embd"]], "n_ctx": [hf["n_positions"]]}
    for key, values in computed.items():
        if hf.get(key, values[0]) not in values:
            raise ValueError(f"{file}: {key} is {hf[key]!r}, and this model computes only "
                             f"{' or '.join(map(repr, values))}. Take other weights.")
    return {"block_size": hf["n_positions"], "vocab_size": hf["vocab_size"], "bias": True,
            "n_layer": hf["n_layer"], "n_head": hf["n_head"], "n_embd": hf["n_embd"]}


def read_weights(folder):
    """All tensors of the folder, {name: tensor}, without the prefix "transformer."."""
    files = [name for name in FILES if (folder / name).exists()][:1]
    if not files:
        raise ValueError(f"{folder} holds no weights, none of {FILES}")
    if files[0].endswith(".json"):
        index = folder / files[0]
        places = read(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index} has no weight_map, which says where each tensor is")
        files = sorted({str(name) for name in places.values()})
        for name in files:
            if Path(name).name != name:  # "../x" could be any file of this machine
                raise ValueError(f"{index} names {name!r}, wanted a file of the same folder")
    weights = {}
    for file in files:
        for name, w in read(folder / file).items():
            name = name.removeprefix("transformer.")
            if name in weights:
                raise ValueError(f"{folder / file} holds {name}, which was there already")
            weights[name] = w
    return weights


@torch.no_grad()
def copy_weights(folder, model):
    """Copy the folder's weights into a model.GPT. Raises ValueError, naming the tensor, where
    they do not fit it."""
    weights = read_weights(folder)
    wanted = dict(model.named_parameters())  # it lists the tied head once, as wte.weight
    tied = read(folder / "config.json").get("tie_word_embeddings", True)
    if "lm_head.weight" in weights or not tied:
        wanted["lm_head.weight"] = model.wte.weight  # the last: then wte.weight is there
    for name in weights:
        # GPT-2's files also hold its causal masks
        if name not in wanted and not name.endswith((".attn.bias", ".attn.masked_bias")):
            raise ValueError(f"{folder} holds {name}, for which config.json has no place")
    for name, p in wanted.items():
        if name not in weights:
            raise ValueError(f"{folder} lacks the tensor {name}")
        w = weights[name]
        if not torch.is_tensor(w) or w.layout != torch.strided or not w.is_floating_point():
            raise ValueError(f"{folder}: {name} is no array of floats. Take weights that are not "
                             "quantised.")
        # OpenAI's Conv1D stores (in, out) where nn.Linear stores (out, in)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w = w.t()
        if w.shape != p.shape:
            raise ValueError(f"{folder}: tensor {name} has shape {tuple(w.shape)}, "
                             f"config.json makes it {tuple(p.shape)}")
        w = w.to(p.dtype)
        if not w.isfinite().all():
            raise ValueError(f"{folder}: {name} holds nan or infinity. Take other weights.")
        if name == "lm_head.weight" and not torch.equal(w, p):
            raise ValueError(f"{folder}: lm_head.weight is not wte.weight. This model has one "
                             "tensor for both. Take other weights.")
        p.copy_(w)
