"""lab/export.py: what it writes is what tiktoken, model.GPT and the run's data say, and, where
transformers is installed, what transformers reads. The runs here are untrained."""
import json
import math
import os
from functools import lru_cache

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

import data
from dpo import dpo_loss, pair_logps
from lab import export
from model import GPT, GPTConfig
from support import checkpoints
from support.files import read_json, write_json
from support.run import data_sha256, load_run

EOS = "<|endoftext|>"
TOKENIZERS = [data.get_tokenizer("toy")]
if os.environ.get("TIKTOKEN_CACHE_DIR"):  # without it, tiktoken would use the network
    TOKENIZERS.append(data.get_tokenizer("gpt2"))
by_name = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)


def write_run(folder, tokenizer, **flags):
    """A run of two models that differ and were not trained."""
    torch.manual_seed(0)
    flags = {"tokenizer": tokenizer.name, "data": None, "pairs": 30, "annotator": "ai", "seed": 3,
             "max_length": 60} | flags
    if flags["data"]:
        flags["data_sha256"] = data_sha256(flags["data"])
    config = GPTConfig(24, tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=8)
    sft, dpo = GPT(config), GPT(config)
    for p in [*sft.parameters(), *dpo.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    write_json(flags, folder / "flags.json")
    checkpoints.save_model(sft, folder / "sft.pt")
    checkpoints.save_model(dpo, folder / "dpo.pt", reference=checkpoints.fingerprint(sft))
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", TOKENIZERS[0])


# ---- Tokens

def test_the_character_of_each_byte():
    """GPT-2's own: a visible byte is its character, and the others follow from 256 on, in order.
    Known: a space is Ġ, a line's end Ċ, byte 127 is ġ, and the soft hyphen 173 is Ń."""
    char = export.characters()
    assert len(char) == len(set(char.values())) == 256 and not any(map(str.isspace, char.values()))
    assert [char[b] for b in (32, 10, 127, 173, 0, 65, 0xC3, 255)] == list("ĠĊġŃĀAÃÿ")


@lru_cache(maxsize=None)
def written(tokenizer):
    """tokenizer.json's model, and the place of each merge."""
    model = json.loads(json.dumps(export.tokenizer_json(tokenizer)))["model"]
    return model, {tuple(pair): i for i, pair in enumerate(model["merges"])}


def byte_pairs(tokenizer, piece):
    """The tokens of a piece of text, as tokenizer.json says. With ignore_merges, a piece that is a
    token becomes it. Else the first merge of the list that is possible is done, at its leftmost
    place, until none is."""
    model, order = written(tokenizer)
    vocab, char = model["vocab"], export.characters()
    parts = [char[b] for b in piece]
    if model["ignore_merges"] and "".join(parts) in vocab:
        return [vocab["".join(parts)]]
    while pairs := [(order[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in order]:
        _, i = min(pairs)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [vocab[part] for part in parts]


SOME = [b" ", b"\n", b"=", b"-", b"a", b"ab", b"the", b" the", b"funny", b" funny", b"ing", b"\xc3",
        "é".encode(), "日本".encode(), "😀".encode()]


@by_name
def test_the_merges_give_tiktokens_tokens(tokenizer):
    """Every piece of bytes, be it words in a row, runs of one character, or no text in UTF-8."""
    known = [tokenizer.decode_single_token_bytes(i) for i in range(250, tokenizer.n_vocab - 1, 97)]
    token = st.sampled_from(SOME + known)
    runs = st.tuples(token, st.integers(1, 40)).map(lambda run: run[0] * run[1])

    @given(st.lists(token | runs, min_size=1, max_size=8).map(b"".join)
           | st.binary(min_size=1, max_size=30))
    @example(b" " * 79)
    def check(piece):
        assert byte_pairs(tokenizer, piece) == tokenizer._encode_single_piece(piece)
    check()


@by_name
def test_text_is_split_by_tiktokens_pattern(tokenizer):
    pattern = export.tokenizer_json(tokenizer)["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    assert pattern["Regex"].replace(export.WORD, r"\w") == tokenizer._pat_str
    assert r"\w" not in pattern["Regex"], "transformers reads another set of characters in it"


# ---- Models

def test_the_exported_models_are_the_runs(run):
    """Read again by GPT.from_pretrained: the same logits, bit by bit. The tied head is written
    once, and nothing would be dropped in training."""
    export.main([str(run)])
    _, tokenizer, models = load_run(run)
    tokens = torch.randint(tokenizer.n_vocab, (2, 24))
    for part, name in (("policy", "dpo"), ("reference", "sft")):
        folder = run / "export" / part
        assert torch.equal(GPT.from_pretrained(folder)(tokens), models[name](tokens))
        assert {f.name for f in folder.iterdir()} == {
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        config, eos = read_json(folder / "config.json"), tokenizer.eot_token
        assert config["eos_token_id"] == config["bos_token_id"] == eos
        assert config["attn_pdrop"] == config["embd_pdrop"] == config["resid_pdrop"] == 0
        names = load_file(folder / "model.safetensors")
        assert all(name.startswith("transformer.") for name in names)
        assert read_json(folder / "tokenizer_config.json")["model_max_length"] == 24


# ---- Pairs

def test_the_pairs_of_a_toy_run(run):
    export.main([str(run), "--to", str(run / "new" / "place")])
    pairs = data.load_preferences(run / "new" / "place" / "train.jsonl")
    assert pairs == data.make_preferences(30, "ai", 3)
    assert {f.name for f in (run / "new" / "place").iterdir()} == {
        "policy", "reference", "train.jsonl"}


def own_run(tmp_path):
    """A run on 20 pairs, and two that no run uses: one teaches nothing and one is too long."""
    rows = [(f"{i} \u2028ü?", f" yes 😀 {i}", f"\nno{i}") for i in range(20)]
    unused = [("equal", "x", "x"), ("long", "x " * 40, "y")]
    file = tmp_path / "mine.jsonl"
    keys = "prompt", "chosen", "rejected"
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows + unused]
    file.write_text("\n".join(lines), encoding="utf-8")
    run = write_run(tmp_path / "run", TOKENIZERS[0], data=str(file))
    return rows, file, run


def test_the_pairs_of_a_run_on_own_data(tmp_path):
    """Each text as it was, on one side: the pairs that the run was trained on, and the others."""
    rows, file, run = own_run(tmp_path)
    export.main([str(run)])
    sides = []
    for side in ("train", "held_out"):
        pairs = data.load_preferences(run / "export" / f"{side}.jsonl")
        sides.append([(p.prompt, p.chosen, p.rejected) for p in pairs])
    assert sorted(sides[0] + sides[1]) == sorted(rows) and sides[0] and sides[1]
    _, examples = export.own_data.load(str(file), TOKENIZERS[0], 60, 3)
    assert [x for x, _, _ in sides[0]] == [TOKENIZERS[0].decode(e.prompt) for e in examples]


@pytest.mark.parametrize("pair, differs", [
    (data.Pair("it was", " funny", " dull"), False), (data.Pair("it was ", "funny", "x"), True),
    (data.Pair("it was", " funny", "funny"), True), (data.Pair("a", f" {EOS} x", " b"), True),
])
def test_pairs_with_other_tokens_in_trl_are_counted(pair, differs):
    """The prompt's last word or space merges with a response, or a text holds the name of EOS."""
    assert export.differs_in_trl(pair, TOKENIZERS[0]) is differs


# ---- The folder

def test_nothing_is_overwritten(run, capsys):
    export.main([str(run)])
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*")}
    with pytest.raises(SystemExit, match="export is there already.*another --to"):
        export.main([str(run)])
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*")} == before
    out = capsys.readouterr().out
    assert "30 pairs; of 0 TRL makes other tokens" in out
    assert f'AutoTokenizer.from_pretrained("{(run / "export").as_posix()}/policy")' in out


def test_no_half_of_a_folder_is_left(run, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(export, "save_preferences", die)
    before = set(run.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        export.main([str(run)])
    assert set(run.rglob("*")) == before


def test_what_cannot_be_exported_says_why(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        export.main([str(tmp_path)])
    _, file, run = own_run(tmp_path)
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(data.DataError, match="mine.jsonl has changed since"):
        export.main([str(run)])
    assert not (run / "export").exists()


# ---- transformers itself

@by_name
def test_transformers_reads_the_same_model(tokenizer, tmp_path, capsys):
    """By the lines that are printed. Logits to 1e-5: both are float32."""
    pytest.importorskip("transformers")
    run = write_run(tmp_path / "run", tokenizer)
    export.main([str(run)])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    found = {}
    exec("\n".join(lines), found)
    tokens = torch.randint(tokenizer.n_vocab, (2, 24))
    with torch.no_grad():
        error = found["policy"](tokens).logits - load_run(run)[2]["dpo"](tokens)
    assert error.abs().max() < 1e-5
    theirs = found["tokenizer"]
    assert theirs.eos_token_id == found["policy"].config.eos_token_id == tokenizer.eot_token
    assert theirs(f"a{EOS}")["input_ids"][-1] == tokenizer.eot_token, "how TRL ends a response"
    words = [tokenizer.decode([i]) for i in range(300, tokenizer.n_vocab - 1, 97)]
    word = st.sampled_from([" ", "\n", " funny", "²", "\u200d", "'s", EOS, *words])
    any_text = st.text(st.characters(exclude_categories=["Cs"]))

    @given(st.lists(word | any_text, max_size=8).map("".join))
    def check(text):
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode_ordinary(text) and theirs.decode(ids) == text
    check()


def test_the_first_loss_of_trl_is_ours(run, tmp_path):
    """One step of TRL's DPOTrainer on the exported policy, reference and pairs, in float32, without
    dropout. Its loss is that of dpo.py to 1e-5. The policy is not the reference, so that the loss
    is far from ln 2. Afterwards TRL's policy has moved."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    from datasets import Dataset
    to = tmp_path / "export"
    export.main([str(run), "--to", str(to)])
    rows = [json.loads(line) for line in (to / "train.jsonl").read_text("utf-8").splitlines()][:8]
    _, tokenizer, models = load_run(run)
    examples, _ = data.tokenize([data.Pair(**row) for row in rows], tokenizer)
    with torch.no_grad():
        batch = data.collate(examples)
        logps = pair_logps(models["dpo"], batch) + pair_logps(models["sft"], batch)
        ours = dpo_loss(*logps, 1.0)[0].mean().item()
    assert abs(ours - math.log(2)) > 0.02

    def read(name):
        return transformers.AutoModelForCausalLM.from_pretrained(to / name)
    policy = read("policy")
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=1.0, per_device_train_batch_size=8, max_steps=1,
        logging_steps=1, learning_rate=1e-3, max_length=None, save_strategy="no", report_to="none",
        bf16=False, use_cpu=True, disable_tqdm=True)
    trainer = trl.DPOTrainer(
        model=policy, ref_model=read("reference"), args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(to / "policy"))
    trainer.train()
    theirs = trainer.state.log_history[0]["loss"]
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert not torch.equal(policy.transformer.wte.weight, read("policy").transformer.wte.weight)
