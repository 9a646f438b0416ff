"""Runs that are killed, disks that are full, and runs by two processes. tests/accidents.py does the
accidents by the dozen."""
import os
import subprocess
import sys

import pytest

import accidents
from conftest import ROOT
from support.checkpoints import load_model
from support.files import read_jsonl

pytestmark = pytest.mark.slow


def test_killed_runs_end_as_those_that_were_not():
    """One run is killed at a random moment, and one is killed twice. Weights, metrics, summary and
    files are then those of a run that nobody killed, to the bit."""
    for where, same in accidents.kills(2):
        assert same, f"killed with {where}, the run came to another end"


def test_a_full_disk_costs_no_more_than_the_last_steps():
    """At three of a run's writes the disk is full, and half of the file is there. The run says so,
    and what was saved before is whole: the run goes on to the same end, to the bit."""
    for where, said, same in accidents.full_disks(3, seed=1):
        assert same, f"the disk was full at {where}: {said}"
        assert "--resume continues" in said


# The trainings in float64, without the exact measurements. The process with number 1, where there
# is one, is interrupted in a step.
DRIVER = """
import sys
import torch
import evaluate, support.figures, support.run, train
from support import command, processes
torch.set_default_dtype(torch.float64)
evaluate.exact_logps = evaluate.measure = evaluate.report = lambda *args: {}
support.figures.draw_run = lambda *args: None
support.run.LOG_EVERY, train.SFT_TEXTS = 5, 1601
clip, steps = train.clip_grad_norm_, 0

def count(*args):
    global steps
    steps += 1
    if steps == int(sys.argv[1]) and processes.rank() == 1:
        command.asked_to_stop = True
    return clip(*args)

train.clip_grad_norm_ = count
command.run(lambda: train.main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's gloo is not built for Windows")
def test_two_processes_are_one(tmp_path):
    """51 steps of SFT, of DPO and of plain DPO, on one process and on two; the last batch has one
    row, so that a process is without work. In the middle of plain DPO one of the two is
    interrupted; both stop, and go on with --resume. All that is logged agrees to 1e-9, and the
    weights to 1e-8. That is in float64. In float32 the key biases differ: a softmax does not see
    them, so their gradient is rounding, and Adam makes steps of full size of any gradient."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    small = ["--pairs", "1601", "--epochs", "1", "--batch-size", "32", "--n-embd", "32",
             "--accumulate", "2", "--device", "cpu"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(before, stop, folder, *flags):
        words = [sys.executable, *before, str(driver), str(stop), *small, "--out-dir", str(folder)]
        return subprocess.run([*words, *flags], cwd=ROOT, env=environment, capture_output=True,
                              encoding="utf-8", timeout=300)
    one, both = tmp_path / "one", tmp_path / "both"
    alone = run([], 0, one)
    assert alone.returncode == 0, alone.stderr[-2000:]
    stopped = run(two, 2 * 51 + 23, both)
    assert stopped.returncode != 0 and "--resume continues" in stopped.stderr
    assert (both / "dpo.pt").exists(), "the two stopped elsewhere"
    assert (both / "plain" / "state.pt").exists(), "one did not wait"
    again = run(two, 0, both, "--resume")
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("Done in") == 1, "one voice is enough"

    logged = [read_jsonl(folder / "metrics.jsonl") for folder in (one, both)]
    for a, b in zip(*logged, strict=True):
        left_out = {"stage", "pairs_per_second", "texts_per_second"}
        if a["step"] == 0:  # all pairs are ties there, but for rounding
            left_out.add("rewards/accuracies")
        for name in a.keys() - left_out:
            assert b[name] == pytest.approx(a[name], rel=1e-9, abs=1e-9), f"{name}, {a['step']}"
    assert {row["stage"] for row in logged[0]} == {"sft", "plain", "dpo"}
    for name in ("sft", "plain", "dpo"):
        models = [load_model(folder / f"{name}.pt")[0] for folder in (one, both)]
        for p, q in zip(*[m.parameters() for m in models], strict=True):
            assert (p - q).abs().max() < 1e-8, name
