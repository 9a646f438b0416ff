"""The flags of every command: what cannot be used is refused before anything is read, trained or
written. And support/machine.py, which says what a machine has and what a training asks of it."""
import argparse
import inspect
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import rlhf
import train
from conftest import ROOT
from exercises import find_the_bug, grade_class, grading
from lab import (
    all_text,
    bench,
    compare,
    doubling,
    export,
    league,
    leak,
    paper,
    remedies,
    systems,
    tables,
)
from model import GPT, GPTConfig, sequence_logps
from support import checkpoints, flags, machine
from support.files import write_json
from support.machine import precision_of

COMMANDS = {"train.py": train.main, "evaluate.py": evaluate.main, "rlhf.py": rlhf.main,
            "lab/all_text.py": all_text.main, "lab/bench.py": bench.main,
            "lab/compare.py": compare.main, "lab/doubling.py": doubling.main,
            "lab/export.py": export.main, "lab/leak.py": leak.main,
            "lab/league.py": league.main, "lab/paper.py": paper.main,
            "lab/remedies.py": remedies.main, "lab/systems.py": systems.main,
            "lab/tables.py": tables.main,
            "exercises/find_the_bug.py": find_the_bug.main,
            "exercises/grade_class.py": grade_class.main, "exercises/grading.py": grading.main}

# For every number: values that are just out of its range, or far out of it.
NUMBERS = {
    "train.py": {
        "--seed": "-1 4294967296 1180591620717411303424 1.5", "--n-layer": "0 -1 201 1e3",
        "--n-embd": "0 -32 31 1000000000 64.0", "--sft-epochs": "-1 1001 0.5",
        "--epochs": "0 -1 1001 1e9", "--batch-size": "0 -1 1000001 2.0",
        "--accumulate": "0 -1 1000001 1.5", "--pairs": "0 -5 10000001 1e6",
        "--max-length": "0 2 -1 1000001 1e2", "--sft-lr": "0 -1e-3 1e-10 1.1 1e400",
        "--lr": "0 -0.0 -1e-3 1e-10 1.1 1e400", "--beta": "0 -0.1 1e-10 1e10 1e400",
        "--stray-weight": "-0.1 -1e-9 1e7", "--nll-weight": "-0.1 -1e-9 1e7",
        "--label-smoothing": "-0.1 0.5 0.6 1 10"},
    "rlhf.py": {"--samples": "0 -1 511 10000001 1e4"},
    "lab/bench.py": {
        "--n-layer": "0 -1 201 1e3", "--n-embd": "0 -32 31 1000000000 64.0",
        "--n-head": "0 -1 1000001 1.5", "--vocab": "0 -1 1000001 1e3",
        "--prompt": "0 -1 1000001 1e3", "--response": "0 -1 1000001 1e3",
        "--pairs": "0 -5 10000001 1e6", "--repeats": "0 -1 101 1.5", "--seconds": "0 -1 86401 1.5",
        "--threads": "0 -1 1025 1.5"},
    "lab/compare.py": {"--samples": "0 -1 511 10000001 1e4"},
    "lab/doubling.py": {"--repeats": "0 -1 101 1.5", "--threads": "0 -1 1025 1.5"},
    "exercises/grade_class.py": {
        "--jobs": "0 -1 1001 1.5", "--seconds": "0 -1 86401", "--longest": "0 -1 86401",
        "--gigabytes": "0 -1 0.4 1e7", "--seed": "-1 4294967296 1180591620717411303424"},
}
NO_NUMBERS = ["nan", "-nan", "inf", "-inf", "x", "", " ", "1,5", "0x10", "ten"]

# Everything else: a command line, and what the answer says of it. The folder it is typed in:
# pairs.jsonl (pairs), empty/ (an empty folder), file.txt (a text), own/ (a finished run on
# somebody's pairs), begun/ (a run without dpo.pt), work/ (a class).
LONG = "a" * 300
OTHERS = {
    "train.py": [
        ("--data absent.jsonl", "--data: absent.jsonl cannot be read"),
        ("--data empty", "--data: 'empty' is a folder without a dataset"),
        ("--data ''", "--data: '' is a folder without a dataset"),
        (f"--data {os.devnull}", "is a pipe or a device"),
        ("--data file.txt/pairs.jsonl", "--data: file.txt/pairs.jsonl cannot be read"),
        (f"--data {LONG}", "cannot be read"),
        ("--data pairs.jsonl --pairs 100", "--pairs is about the toy world"),
        ("--data pairs.jsonl --annotator ai", "--annotator is about the toy world"),
        ("--skip-bad-rows", "--skip-bad-rows needs --data"),
        ("--max-length 100", "--max-length needs --data"),
        ("--tokenizer gpt2", "--tokenizer gpt2 needs --data"),
        ("--tokenizer gpt5", "--tokenizer: invalid choice: 'gpt5'"),
        ("--init absent.pt", "--init: absent.pt cannot be read"),
        ("--init empty", "--init: 'empty' is not a checkpoint (NAME.pt), a folder with a config"),
        ("--init file.txt", "--init: 'file.txt' is not a checkpoint"),
        ("--init gpt5", "or one of gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        ("--init ''", "--init: '' is not a checkpoint"),
        (f"--init {LONG}.pt", "cannot be read"),
        ("--init gpt2", "--init gpt2 needs --data and --tokenizer gpt2"),
        ("--init gpt2 --data pairs.jsonl", "--init gpt2 needs --data and --tokenizer gpt2"),
        ("--init own/dpo.pt --n-embd 64", "--n-embd has no effect with --init"),
        ("--init own/dpo.pt --n-layer 1", "--n-layer has no effect with --init"),
        ("--init own/dpo.pt --sft-epochs 0 --sft-lr 0.1", "--sft-lr has no effect with --sft-ep"),
        ("--sft-epochs 0", "--sft-epochs 0 needs --init"),
        ("--out-dir file.txt", "--out-dir: file.txt cannot be written to"),
        ("--out-dir file.txt/run", "--out-dir: file.txt/run cannot be written to"),
        (f"--out-dir {LONG}", "cannot be written to"),
        ("--out-dir ''", "--out-dir: '' is no name for a folder"),
        ("--out-dir ' '", "--out-dir: ' ' is no name for a folder"),
        ("--out-dir out/nul", "--out-dir: 'out/nul' is no name for a folder"),
        ("--out-dir CON.run", "--out-dir: 'CON.run' is no name for a folder"),
        ("--data .jsonl", "'' is no name for a folder; choose another one"),
        ("--device cuda", "--device: cuda is not on this machine, which has cpu"),
        ("--device mps", "--device: mps is not on this machine, which has cpu"),
        ("--device tpu", "--device: tpu is not on this machine, which has cpu"),
        ("--dtype float16", "--dtype: invalid choice: 'float16'"),
        ("--annotator cat", "--annotator: invalid choice: 'cat'"),
        ("--loss dpo", "--loss: invalid choice: 'dpo'"),
        ("--label-smoothing 0.1", "--label-smoothing is not defined for --loss sigmoid"),
        ("--loss ipo --label-smoothing 0.1", "--label-smoothing is not defined for --loss ipo"),
        ("--loss hinge --label-smoothing 0.1", "is not defined for --loss hinge; use --loss cdpo"),
        ("--n-embd 50", "--n-embd 50 must be a multiple of 32"),
        ("--accumulate 65", "--accumulate 65 must be at most --batch-size 64"),
        ("--n-embd 16384 --n-layer 200", "MB are free; make room or choose another disk"),
        ("--bta 1", "unrecognized arguments: --bta 1"),
        ("pairs.jsonl", "unrecognized arguments: pairs.jsonl"),
    ],
    "evaluate.py": [
        ("", "the following arguments are required: dir"),
        ("absent", "absent holds no finished run (no flags.json)"),
        ("file.txt", "file.txt holds no finished run (no flags.json)"),
        ("begun", "begun holds no finished run (no dpo.pt)"),
        ("begun --prompt Why?", "begun holds no finished run (no dpo.pt)"),
        ("own --prompt", "--prompt: expected one argument"),
    ],
    "rlhf.py": [
        ("", "the following arguments are required: dir"),
        ("absent", "absent holds no finished run (no flags.json)"),
        ("begun", "begun holds no finished run (no dpo.pt)"),
        ("own", "own was trained with --data; this needs the toy world"),
    ],
    "lab/bench.py": [
        ("--shapes huge", "--shapes: invalid choice: 'huge'"),
        ("--n-embd 100 --n-head 3", "--n-embd 100 must be a multiple of --n-head 3"),
        ("--n-head 3", "--n-embd 128 must be a multiple of --n-head 3"),
        ("--work sft", "--work: invalid choice: 'sft'"),
        ("--against dpo", "--against: invalid choice: 'dpo'"),
        ("--against trl", "--against needs --trl-python"),
        ("--trl-python absent", "--trl-python: 'absent' is no python that has TRL"),
        ("--trl-python file.txt", "--trl-python: 'file.txt' is no python that has TRL"),
        ("--trl-python empty", "--trl-python: 'empty' is no python that has TRL"),
        ("--trl-python ''", "--trl-python: '' is no python that has TRL"),
        ("--device cuda", "--device: cuda is not on this machine, which has cpu"),
        ("--device tpu", "--device: tpu is not on this machine, which has cpu"),
        ("--dtype float16", "--dtype: invalid choice: 'float16'"),
        ("--json empty", "--json: 'empty' is a folder; name a file"),
        ("--json ''", "--json: '' is a folder; name a file"),
        ("--json file.txt/a.json", "file.txt cannot be written to"),
        (f"--json {LONG}/a.json", "cannot be written to"),
        ("toy", "unrecognized arguments: toy"),
    ],
    "lab/compare.py": [
        ("", "the following arguments are required: dir"),
        ("absent", "absent holds no finished run (no flags.json)"),
        ("begun", "begun holds no finished run (no dpo.pt)"),
        ("own", "own was trained with --data; this needs the toy world"),
        ("own --device cuda", "--device: cuda is not on this machine, which has cpu"),
        ("own --device tpu", "--device: tpu is not on this machine, which has cpu"),
    ],
    "lab/doubling.py": [
        ("--to file.txt", "--to: file.txt cannot be written to"),
        ("--to ''", "--to: '' is no name for a folder"),
        ("--device cuda", "--device: cuda is not on this machine, which has cpu"),
        ("--device tpu", "--device: tpu is not on this machine, which has cpu"),
        ("out/doubling", "unrecognized arguments: out/doubling"),
    ],
    "lab/all_text.py": [
        ("", "the following arguments are required: dir"),
        ("absent", "absent holds no finished run (no flags.json)"),
        ("own", "own was trained with --data; this needs the toy world"),
    ],
    "lab/export.py": [
        ("", "the following arguments are required: dir"),
        ("absent", "absent holds no finished run (no flags.json)"),
        ("begun", "begun holds no finished run (no dpo.pt)"),
        ("own --to empty", "empty is there already and is not overwritten"),
        ("own --to file.txt/new", "--to: file.txt/new cannot be written to"),
        ("own --to file.txt", "--to: file.txt cannot be written to"),
        ("own --to work", "work is there already and is not overwritten"),
    ],
    "lab/leak.py": [
        ("", "the following arguments are required: dirs"),
        ("absent", "absent holds no finished run (no flags.json)"),
        ("begun", "begun holds no finished run (no dpo.pt)"),
        ("own", "own was trained with --data; this needs the toy world"),
    ],
    "lab/league.py": [
        ("", "the following arguments are required: DIR"),
        ("absent", "absent holds no finished run (no flags.json)"),
        ("begun", "begun holds no finished run (no dpo.pt)"),
        ("own", "own was trained with --data; this needs the toy world"),
        ("own --conditions noisy", "--conditions: invalid choice: 'noisy'"),
        ("own --conditions", "--conditions: expected at least one argument"),
    ],
    "lab/paper.py": [
        ("", "the following arguments are required: NAME"),
        ("fig5", "NAME: invalid choice: 'fig5'"),
    ],
    "lab/remedies.py": [
        ("", "the following arguments are required: dirs"),
        ("absent", "absent holds no finished run (no flags.json)"),
        ("begun", "begun holds no finished run (no dpo.pt)"),
        ("own", "own was trained with --data; this needs the toy world"),
    ],
    "lab/systems.py": [
        ("", "the following arguments are required: DIR"),
        ("absent", "absent holds no finished run (no flags.json)"),
        ("begun --done", "begun holds no finished run (no dpo.pt)"),
        ("own", "own was trained with --data; this needs the toy world"),
    ],
    "lab/tables.py": [("out/toy", "unrecognized arguments: out/toy")],
    "exercises/find_the_bug.py": [
        ("0", "there is no bug 0; they are numbered 1 to"),
        ("-1", "there is no bug -1; they are numbered 1 to"),
        ("999", "there is no bug 999; they are numbered 1 to"),
        ("seven", "number: invalid int value: 'seven'"),
        ("--hint", "give the number of a bug, as in: 7 --hint"),
        ("--reveal", "give the number of a bug"),
        ("--copy new", "give the number of a bug"),
        ("7 --hint --reveal", "--reveal: not allowed with argument --hint"),
        ("7 --copy file.txt", "--copy: file.txt cannot be written to"),
        ("7 --copy ''", "--copy: '' is no name for a folder"),
        ("999 --hint", "there is no bug 999"),
        ("999 --reveal", "there is no bug 999"),
        ("999 --copy new", "there is no bug 999"),
    ],
    "exercises/grade_class.py": [
        ("work", "the following arguments are required: --out"),
        ("--out a.csv", "the following arguments are required: folder"),
        ("absent --out a.csv", "absent: there is no such folder"),
        ("file.txt --out a.csv", "file.txt: there is no such folder"),
        ("empty --out a.csv", "empty holds no Python file and no folder"),
        ("work --out file.txt", "file.txt exists and is left as it is; choose another --out"),
        ("work --out grades", "--out grades: name a file such as grades.csv"),
        ("work --out file.txt/a.csv", "--out file.txt/a.csv"),
        ("work --out a.csv --points absent.toml", "absent.toml"),
        ("work --out a.csv --points file.txt", "file.txt"),
        ("work --out a.csv --points empty", "empty"),
    ],
    "exercises/grading.py": [("mine.py", "unrecognized arguments: mine.py")],
}
# these take no value, and fit every other flag
NEVER_WRONG = {"--help", "--resume", "--recompute", "--gradescope", "--record", "--done"}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The folder that the commands of OTHERS are typed in. No model can be made there, and the
    machine has a CPU alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "own", "begun", "work"):
        Path(name).mkdir()
    for name in ("pairs.jsonl", ".jsonl", "file.txt", "own/sft.pt", "own/dpo.pt", "begun/sft.pt",
                 "work/a.py"):
        Path(name).write_text("a text", encoding="utf-8")
    run = {"data": "pairs.jsonl", "annotator": "human", "tokenizer": "absent", "seed": 0}
    for folder in ("own", "begun"):
        write_json(run, Path(folder) / "flags.json")

    def refuse(*args, **kwargs):
        raise AssertionError("a model was made")
    monkeypatch.setattr(GPT, "__init__", refuse)
    has_only(monkeypatch)
    return tmp_path


def has_only(monkeypatch, cuda=False, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def answer(command, words, capsys):
    """What a command says as it refuses: argparse's error, with exit code 2, or one message."""
    with pytest.raises(SystemExit) as refused:
        COMMANDS[command](words)
    code, err = refused.value.code, capsys.readouterr().err
    assert code == 2 or isinstance(code, str), f"{words}: it ended with {code!r}"
    return err if code == 2 else code


@pytest.mark.parametrize("command, flag", [(c, f) for c in NUMBERS for f in NUMBERS[c]])
def test_a_number_out_of_range_is_refused(desk, capsys, command, flag):
    """The answer names the flag and the value, and says what is wrong with it: exit code 2."""
    for value in NUMBERS[command][flag].split() + NO_NUMBERS:
        said = answer(command, ["pairs.jsonl", f"{flag}={value}"], capsys)
        reason = "must be at (least|most) [0-9]|is not a (whole )?number"
        want = rf"argument {flag}: '?{re.escape(value)}'? ({reason})"
        assert re.search(want, said), f"{flag}={value}: {said}"
    assert "Traceback" not in said


@pytest.mark.parametrize("command, line, words", [
    (command, *row) for command, rows in OTHERS.items() for row in rows])
def test_what_cannot_be_used_is_refused(desk, capsys, command, line, words):
    """And nothing is written, neither a folder nor a file, and no model is made."""
    before = contents(desk)
    assert words in answer(command, shlex.split(line), capsys)
    assert contents(desk) == before


class Found(Exception):
    """Carries a command's parser out of it."""


def options(main, monkeypatch):
    """All that the parser of a command knows: option strings, and names of positional arguments."""
    def stop(parser, argv=None):
        raise Found(parser)
    with monkeypatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        main([])
    for action in found.value.args[0]._actions:
        yield action.option_strings[-1] if action.option_strings else action.metavar or action.dest


def test_every_flag_of_every_command_has_a_bad_value_in_these_tables(monkeypatch):
    """So a new flag without a row fails here, and so does a new command."""
    parsing = set()
    for folder in (ROOT, ROOT / "lab", ROOT / "exercises"):
        for file in folder.glob("*.py"):
            source = file.read_text(encoding="utf-8")
            if "ArgumentParser(" in source or "flags.parse_args(" in source:
                parsing.add(file.relative_to(ROOT).as_posix())
    assert parsing == COMMANDS.keys() == OTHERS.keys()
    for command, main in COMMANDS.items():
        rows = " ".join(f"{line} {words}" for line, words in OTHERS[command])
        tried = set(re.findall(r"[\w-]+", rows)) | NUMBERS.get(command, {}).keys()
        missing = set(options(main, monkeypatch)) - tried - NEVER_WRONG
        assert not missing, f"{command}: no bad value is tried of {missing}"


@pytest.mark.parametrize("given, words", [
    ("--bug=99999", "--bug 99999: there is no bug 99999; they are numbered 1 to"),
    ("--bug=0", "--bug 0: there is no bug 0"),
    ("--bug=x", "--bug: invalid int value: 'x'"),
    ("--claim=99999", "--claim 99999: the claims are numbered 1 to"),
    ("--claim=0", "--claim 0: the claims are numbered 1 to"),
    ("--altered", "--altered needs the number of a claim"),
    ("--impl=absent.py", "--impl absent.py: there is no such file"),
    ("--impl=tests", "--impl tests: there is no such file"),
    ("--seed=-1", "--seed -1 must be from 0 to"),
    ("--seed=1180591620717411303424", "--seed 1180591620717411303424 must be from 0 to"),
    ("--seed=1.5", "--seed: invalid int value: '1.5'"),
])
def test_the_options_of_pytest_are_checked_too(capsys, given, words):
    assert pytest.main([f"--rootdir={ROOT}", "-q", given, str(ROOT / "tests" / "test_trie.py")]
                       ) == pytest.ExitCode.USAGE_ERROR
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and "INTERNALERROR" not in said


@pytest.mark.parametrize("prompt, tokens", [("", 0), ("xyz " * 8, 32)])
def test_a_prompt_that_no_model_can_read_is_refused(tmp_path, prompt, tokens):
    """A model of 32 tokens reads 1 to 31. In the toy vocabulary a letter is a token, and so is a
    space."""
    model = GPT(GPTConfig(32, 523, n_layer=1, n_head=1, n_embd=32))
    for name in ("sft", "dpo"):
        checkpoints.save_model(model, tmp_path / f"{name}.pt",
                               reference=checkpoints.fingerprint(model))
    write_json({"data": None, "annotator": "human", "tokenizer": "toy", "seed": 0},
               tmp_path / "flags.json")
    with pytest.raises(SystemExit, match=f"--prompt has {tokens} tokens; this model reads 1 to 31"):
        evaluate.main([str(tmp_path), "--prompt", prompt])


# ---- What is accepted

@pytest.mark.parametrize("line", [
    "--beta 1e-9 --lr 1 --sft-lr 1e-9 --seed 4294967295 --stray-weight 0", "--beta 1e9 --loss ipo",
    "--loss robust --label-smoothing 0.49", "--out-dir new/of/many", "--out-dir empty --resume",
    "--data pairs.jsonl --max-length 3 --skip-bad-rows --tokenizer gpt2 --init gpt2",
    "--data dataset --init folder --sft-epochs 0", "--init own/dpo.pt --accumulate 64"])
def test_what_can_be_used_is_accepted_and_nothing_is_written(desk, line):
    for file in ("dataset/state.json", "folder/config.json"):
        Path(file).parent.mkdir()
        Path(file).touch()
    before = contents(desk)
    args = flags.parse_args(line.split())
    assert isinstance(args.out_dir, Path) and contents(desk) == before
    assert None not in (vars(args) | {"data": 0, "init": 0}).values(), "defaults are filled in"


@pytest.mark.parametrize("loss", ["cdpo", "robust"])
def test_label_smoothing_is_a_setting_of_two_losses(desk, loss):
    args = flags.parse_args(["--loss", loss, "--label-smoothing", "0.1"])
    settings = flags.dpo_settings(vars(args))
    assert settings["loss"] == loss and settings["label_smoothing"] == 0.1


def test_the_settings_of_a_run_are_arguments_of_train_dpo(desk):
    """Every setting has the flag's value. With them, train_dpo lacks only what is no flag."""
    args = flags.parse_args(["--loss", "ipo", "--nll-weight", "0.5", "--lr", "0.25",
                             "--accumulate", "3", "--seed", "7"])
    settings = flags.dpo_settings(vars(args))
    assert all(settings[name] == getattr(args, name) for name in settings)
    parameters = inspect.signature(train.train_dpo).parameters
    others = ["policy", "examples", "ref_logps", "run", "likely", "stage", "ceiling",
              "measure", "measure_at"]
    assert settings.keys() == parameters.keys() - set(others)


# ---- The machine

def test_the_fastest_device_is_picked(monkeypatch):
    for cuda in (False, True):
        for mps in (False, True):
            has_only(monkeypatch, cuda, mps)
            assert machine.pick_device("auto") == ("cuda" if cuda else "mps" if mps else "cpu")
            assert machine.pick_device("cpu") == "cpu"
            assert machine.devices() == ["cuda"] * cuda + ["mps"] * mps + ["cpu"]


@pytest.mark.parametrize("given, cuda, new, kept", [
    ("", True, True, "float32"), ("--data pairs.jsonl", True, True, "bfloat16"),
    ("--data pairs.jsonl", True, False, "float32"), ("--data pairs.jsonl", False, False, "float32"),
    ("--data pairs.jsonl --dtype float32", True, True, "float32"),
    ("--dtype bfloat16", False, False, "bfloat16"), ("--dtype bfloat16", True, True, "bfloat16"),
    ("--dtype bfloat16", True, False, None), ("--dtype bfloat16", "mps", False, None)])
def test_the_precision_fits_the_device_and_is_kept(desk, monkeypatch, capsys, given, cuda, new,
                                                   kept):
    """auto is bfloat16 on somebody's own pairs and a GPU that has it, else float32. What is kept
    is never auto: a run that goes on is the same run. new: the GPU has bfloat16."""
    has_only(monkeypatch, cuda is True, cuda == "mps")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: new)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8e9, 8e9))
    if kept:
        assert flags.kept(flags.parse_args(given.split()))["dtype"] == kept
        return
    device = "mps" if cuda == "mps" else "cuda"
    assert f"bfloat16: {device} has none; use --dtype float32" in answer(
        "train.py", given.split(), capsys)


def test_the_size_of_a_model_is_known_before_it_is_made():
    """Against the parameters of a GPT. The published sizes of GPT-2, from its weights: 124,439,808
    and 1,557,611,200."""
    for shape in ((1, 32, 9, 8), (3, 64, 500, 40)):
        n_layer, n_embd, vocab_size, block_size = shape
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head=2, n_embd=n_embd))
        assert machine.parameters(*shape) == sum(p.numel() for p in model.parameters())
    for name, size in (("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)):
        assert machine.parameters(*machine.GPT2[name], 50_257, 1024) == size


@pytest.mark.parametrize("n_layer, n_embd", [(2, 64), (6, 128), (12, 128)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_memory_of_a_step_is_about_what_is_expected(n_layer, n_embd, dtype, recompute):
    """Four pairs that share no token, 64 tokens each, all scored. What the backward pass keeps is
    counted, each storage once. What is expected is more, since a step holds more for a moment, but
    not twice as much. Where blocks compute their states again, one block's states come on top."""
    policy = GPT(GPTConfig(64, data.get_tokenizer("toy").n_vocab, n_layer, n_embd // 32, n_embd))
    machine.recompute(policy, recompute)
    tokens = torch.arange(8)[:, None] + torch.randint(250, (8, 64))
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with precision_of(dtype, "cpu"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        sequence_logps(policy, tokens, torch.arange(64).expand(8, 64) > 0)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = sum(tensor.untyped_storage().nbytes() for where, tensor in storages.items()
               if where not in weights)
    args = SimpleNamespace(data="mine.jsonl", max_length=64, batch_size=4, accumulate=1, init=None,
                           tokenizer="toy", n_layer=n_layer, n_embd=n_embd, dtype=dtype,
                           recompute=recompute)
    size = sum(p.numel() for p in policy.parameters())
    expected = machine.needs(args)[0] - machine.IN_MEMORY * size
    one_block = 8 * 64 * 24 * n_embd * (2 if dtype == "bfloat16" else 4) if recompute else 0
    assert kept < expected - one_block < 2 * kept, f"{kept} bytes are kept"


def test_a_full_disk_is_seen_before_the_training(desk, monkeypatch, capsys):
    """GPT-2 writes three checkpoints of 4 bytes a parameter, and twice 12 bytes: 4.486 GB in all.
    A run that goes on has written most of it already."""
    line = "--data pairs.jsonl --tokenizer gpt2 --init gpt2 --out-dir new".split()
    for free, resume, refused in ((4.4, [], True), (4.6, [], False), (4.4, ["--resume"], False)):
        monkeypatch.setattr(machine.shutil, "disk_usage",
                            lambda path, free=free: SimpleNamespace(free=free * 1e9))
        if refused:
            said = answer("train.py", line, capsys)
            assert "--out-dir new: a run of this model writes 4,486 MB and 4,400 MB are" in said
        else:
            flags.parse_args(line + resume)


def test_of_other_weights_the_size_is_that_of_their_files(desk):
    """1,000 parameters in a checkpoint, and in a folder of two files beside a file of something
    else: 36 bytes on disk for each, and 20 MB for metrics and figures."""
    Path("folder").mkdir()
    for name, size in (("own/start.pt", 4000), ("folder/a.safetensors", 2500),
                       ("folder/b.safetensors", 1500), ("folder/config.json", 9)):
        Path(name).write_bytes(bytes(size))
    for where in ("own/start.pt", "folder"):
        _, disk = machine.needs(flags.parse_args(["--init", where]))
        assert disk == 36 * 1000 + 20e6


def test_too_little_memory_is_said(desk, monkeypatch, capsys):
    """GPT-2 on 2 x 16 texts of 512 tokens. By hand: 20 bytes a parameter, 2.48 GB; 12 blocks x 768
    channels x 24 states x 4 bytes a token, 14.5 GB; 50,257 logits x 12 bytes a token, 9.9 GB. In
    16 parts a batch needs a sixteenth of the last two. In bfloat16 a state has 2 bytes. Nothing is
    said where nothing is known."""
    line = "--data pairs.jsonl --tokenizer gpt2 --init gpt2".split()
    for has, more, words in ((26.7e9, [], "may need 26.9 GB of memory; cpu has 26.7 GB"),
                             (27e9, [], ""), (None, [], ""), (5e9, ["--accumulate", "16"], ""),
                             (19e9, ["--dtype", "bfloat16"], "may need 19.6 GB"),
                             (3e9, ["--accumulate", "16"], "may need 4.0 GB")):
        monkeypatch.setattr(machine, "memory", lambda device, has=has: has)
        flags.parse_args(line + more)
        said = capsys.readouterr().err
        assert words in said and bool(said) == bool(words)
    assert "a larger --accumulate, or a smaller --batch-size, --max-length or model" in said


def test_the_memory_of_a_machine_is_known(monkeypatch):
    """Here: more than torch itself needs, and less than a petabyte. On Windows it is the second of
    the eight numbers that the system fills in, the first of which is their size, 64 bytes."""
    assert 1e8 < machine.memory("cpu") < 1e15

    def fill(numbers):
        assert list(numbers) == [64] + [0] * 7
        numbers[1] = 8_000_000_000
        return 1
    system = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=fill))
    monkeypatch.setattr(machine, "os", SimpleNamespace(name="nt"))
    monkeypatch.setattr(machine.ctypes, "windll", system, raising=False)
    assert machine.memory("cpu") == 8_000_000_000
