"""support/gpt2.py: GPT-2's weights, from every kind of folder that holds them. What model.GPT does
not compute is refused by name. The oracle is test_model's second GPT-2, and transformers itself
where that is installed."""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT
from test_model import CONFIG, plain_gpt
from tools import assert_refused


def gpt2_folder(tmp_path, prefix="", **changes):
    """A folder as GPT-2 is published: config.json, and model.safetensors, in which the weights of
    a Conv1D are stored (in, out). Returns the model that was written into it."""
    torch.manual_seed(5)
    source = GPT(CONFIG)
    for p in source.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tensors = {}
    for name, value in source.state_dict().items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.t()
        if name != "head.weight":
            tensors[prefix + name] = value.contiguous().clone()
    for layer in range(2):  # its causal masks
        tensors[prefix + f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
        tensors[prefix + f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix:
        tensors["lm_head.weight"] = source.state_dict()["head.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"n_positions": 24, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16,
              "model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return source


def assert_loads(folder, source, tolerance=1e-9):
    """The folder's logits are those of the source, by the oracle, in float64."""
    tokens = torch.randint(40, (9,))
    oracle = plain_gpt(source.state_dict(), CONFIG, tokens.tolist())
    error = (GPT.from_pretrained(folder).double()(tokens[None])[0] - oracle).abs().max()
    assert error < tolerance, "the weights of a Conv1D are stored transposed"


def assert_folder_refused(folder, *parts):
    """The folder is refused, and the message holds each of the parts."""
    message = assert_refused(GPT.from_pretrained, folder)
    assert "\n" not in message and len(message) < 600, message
    for part in (str(folder), *parts):
        assert part in message, message


# ---- What is computed

@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_weights_load(tmp_path, prefix):
    """Logits in float64 agree to 1e-9. Nothing is dropped, even in training."""
    assert_loads(tmp_path, gpt2_folder(tmp_path, prefix))


@pytest.mark.parametrize("changes, message", [
    ({"n_layer": 3}, "h.2.ln_1.weight"), ({"n_embd": 32}, "shape"), ({"n_layer": 1}, "h.1."),
])
def test_gpt2_weights_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    gpt2_folder(tmp_path, **changes)
    assert_folder_refused(tmp_path, message)


HARMLESS = [
    {"activation_function": "gelu_new"}, {"activation_function": "gelu_pytorch_tanh"},
    {"activation_function": "gelu_accurate"}, {"layer_norm_epsilon": 1e-05}, {"n_inner": None},
    {"n_inner": 64}, {"scale_attn_weights": True}, {"reorder_and_upcast_attn": True},
    {"attn_pdrop": 0.9, "embd_pdrop": 0.9, "resid_pdrop": 0.9}, {"n_ctx": 24},
    {"eos_token_id": 3, "use_cache": False, "summary_type": "mean"},
]
HARMFUL = [
    {"activation_function": "gelu"}, {"activation_function": "relu"},
    {"activation_function": "gelu_fast"}, {"activation_function": "silu"},
    {"layer_norm_epsilon": 1e-6}, {"n_inner": 32}, {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True}, {"add_cross_attention": True}, {"n_ctx": 12},
]


@pytest.mark.parametrize("changes", HARMLESS)
def test_what_changes_no_logit_is_accepted(tmp_path, changes):
    """Also in transformers: see the last test of this file."""
    assert_loads(tmp_path, gpt2_folder(tmp_path, **changes))


@pytest.mark.parametrize("changes", [
    *HARMFUL, {"model_type": "gptj"}, {"quantization_config": {"bits": 4}},
    {"auto_map": {"AutoModel": "x.Y"}}, {"n_positions": "24"}, {"n_head": 0}, {"n_layer": 2.0},
    {"vocab_size": None}, {"n_embd": True},
])
def test_what_the_model_does_not_compute_is_refused_with_key_and_value(tmp_path, changes):
    gpt2_folder(tmp_path, **changes)
    [(key, value)] = changes.items()
    assert_folder_refused(tmp_path, f"config.json: {key} is {value!r}")


def change(folder, **tensors):
    """Put tensors in the place of those in model.safetensors; None takes one away."""
    new = load_file(folder / "model.safetensors") | tensors
    save_file({k: w for k, w in new.items() if w is not None}, folder / "model.safetensors")


def test_a_head_of_its_own_is_refused(tmp_path):
    """Whatever tie_word_embeddings says: the head must be there, or be tied, and equal wte."""
    for tie in ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}):
        source = gpt2_folder(tmp_path, "transformer.", **tie)
        assert_loads(tmp_path, source)
        change(tmp_path, **{"lm_head.weight": source.wte.weight.detach() + 1e-6})
        assert_folder_refused(tmp_path, "lm_head.weight is not wte.weight")
    change(tmp_path, **{"lm_head.weight": None})
    assert_folder_refused(tmp_path, "lacks the tensor lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_load_as_float32(tmp_path, dtype):
    """Exactly the rounded weights, in float32, by the oracle (1e-9)."""
    source = gpt2_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: w.to(dtype) for name, w in tensors.items()}, tmp_path / "model.safetensors")
    assert_loads(tmp_path, source.to(dtype).float())
    assert GPT.from_pretrained(tmp_path).wte.weight.dtype == torch.float32


@pytest.mark.parametrize("value, dtype, message", [
    (float("nan"), torch.float32, "holds nan or infinity"),
    (float("inf"), torch.float16, "holds nan or infinity"),
    (1e300, torch.float64, "holds nan or infinity"),  # in float32 it is infinite
    (1, torch.int8, "is no array of floats"),
])
def test_a_tensor_that_is_no_weight_is_refused_by_name(tmp_path, value, dtype, message):
    gpt2_folder(tmp_path)
    w = torch.ones(16, dtype=dtype)
    w[3] = value
    change(tmp_path, **{"ln_f.bias": w})
    assert_folder_refused(tmp_path, "ln_f.bias", message)


# ---- The files

def shard(folder, ending="safetensors", n=3):
    """Write the folder's weights into n files, and an index. Returns their names."""
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = [f"{stem}-{i + 1:05}-of-{n:05}.{ending}" for i in range(n)]
    places = {}
    for i, name in enumerate(names):
        part = dict(tensors[i::n])
        save = save_file if ending == "safetensors" else torch.save
        save(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return index, names


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("n", [1, 3])
def test_weights_in_several_files_load(tmp_path, ending, n):
    source = gpt2_folder(tmp_path, "transformer.")
    shard(tmp_path, ending, n)
    assert_loads(tmp_path, source)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_state_dict_loads_and_runs_no_code(tmp_path, legacy):
    """In both formats of torch.save. Where model.safetensors is there too, that is read."""
    source = gpt2_folder(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(load_file(tmp_path / "model.safetensors"), file,
               _use_new_zipfile_serialization=not legacy)
    (tmp_path / "model.safetensors").unlink()
    assert_loads(tmp_path, source)
    torch.save({"wte.weight": Code(str(tmp_path / "made"))}, file,
               _use_new_zipfile_serialization=not legacy)
    assert_folder_refused(tmp_path, "pytorch_model.bin cannot be read")
    assert not (tmp_path / "made").exists(), "a pickle has run code"
    gpt2_folder(tmp_path)
    assert_loads(tmp_path, source)


class Code:
    """Where it is unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("content, message", [
    ([torch.ones(2)], "cannot be read"), (torch.ones(2), "cannot be read"),
    ({"model": {"wte.weight": torch.ones(2)}}, "holds model, for which"),
    ({"wte.weight": "text"}, "wte.weight is no array of floats"),
    ({1: torch.ones(2)}, "holds 1, for which"),
    ({"wte.weight": torch.eye(2).to_sparse()}, "wte.weight is no array of floats"),
])
def test_a_pickle_of_something_else_is_refused(tmp_path, content, message):
    gpt2_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert_folder_refused(tmp_path, message)


def break_config(folder, index, names):
    (folder / "config.json").write_text('{"n_layer": 2', encoding="utf-8")


def break_file(folder, index, names):
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-9])


def lose_file(folder, index, names):
    (folder / names[1]).unlink()


def no_weights(folder, index, names):
    index.unlink()


def repeat_tensor(folder, index, names):
    save_file(load_file(folder / names[0]) | load_file(folder / names[1]), folder / names[1])


def point_to(place):
    def write(folder, index, names):
        index.write_text(json.dumps({"weight_map": {"wte.weight": place}}), encoding="utf-8")
    return write


@pytest.mark.parametrize("damage, message", [
    (lambda folder, *_: (folder / "config.json").unlink(), "config.json cannot be read"),
    (lambda folder, *_: (folder / "config.json").write_text("[1]"), "config.json cannot be read"),
    (break_config, "config.json cannot be read"),
    (break_file, "model-00002-of-00003.safetensors cannot be read"),
    (lose_file, "model-00002-of-00003.safetensors cannot be read"),
    (no_weights, "holds no weights"), (repeat_tensor, "which was there already"),
    (lambda _, index, names: index.write_text("{"), "index.json cannot be read"),
    (lambda _, index, names: index.write_text("{}"), "has no weight_map"),
    (point_to("../model.safetensors"), "names '../model.safetensors'"),
    (point_to("/etc/passwd"), "names '/etc/passwd'"), (point_to(".."), "cannot be read"),
    (point_to(""), "cannot be read"), (point_to(7), "cannot be read"),
    (point_to("a\0b"), "cannot be read"), (point_to("config.json"), "holds n_positions, for"),
])
def test_broken_folders_are_refused_with_file_and_reason(tmp_path, damage, message):
    """Each is a ValueError of one line. A folder that an index names must not be left."""
    (tmp_path / "folder").mkdir()
    gpt2_folder(tmp_path)  # outside
    gpt2_folder(tmp_path / "folder")
    damage(tmp_path / "folder", *shard(tmp_path / "folder"))
    assert_folder_refused(tmp_path / "folder", message)


# ---- By name

def test_a_model_of_a_known_name_is_downloaded_once(tmp_path, monkeypatch):
    """From the addresses where GPT-2 is published, into torch.hub's folder. A file that is there
    is not downloaded again."""
    hub, asked = tmp_path / "not" / "there", []
    source = gpt2_folder(tmp_path)

    def download(url, path):
        asked.append(url)
        shutil.copy(tmp_path / url.rsplit("/")[-1], path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    where = "https://huggingface.co/openai-community/gpt2-large/resolve/main/"
    for missing in (["config.json", "model.safetensors"], ["model.safetensors"], []):
        for name in missing:
            (hub / "gpt2-large" / name).unlink(missing_ok=True)
        asked.clear()
        loaded = GPT.from_pretrained("gpt2-large")
        assert asked == [where + name for name in missing]
        assert torch.equal(loaded.h[1].mlp.c_fc.weight, source.h[1].mlp.c_fc.weight)


def test_an_unknown_model_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="gpt2-medium"):
        GPT.from_pretrained("gpt5")


# ---- transformers itself

@pytest.mark.parametrize("changes", HARMLESS + HARMFUL)
def test_transformers_computes_the_same_or_the_option_is_refused(tmp_path, changes):
    """A GPT-2 that transformers has made with each option, and written: its logits in float64 agree
    to 1e-10, or from_pretrained names the option. (transformers ignores n_ctx.)"""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=24, n_layer=2, n_head=2, n_embd=16,
                                     **changes)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    if changes in HARMFUL:
        [key] = changes
        return assert_folder_refused(tmp_path, key)
    tokens = torch.randint(40, (2, 24))
    with torch.no_grad():
        error = GPT.from_pretrained(tmp_path).double()(tokens) - theirs.double()(tokens).logits
    assert error.abs().max() < 1e-10
