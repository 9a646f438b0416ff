"""lab/compare.py: the command, in small, and every row of its table."""
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

import evaluate
import rlhf
import world
from conftest import ROOT
from lab import compare, judges, tabular, work
from lab.finished import Finished
from support.files import read_json, write_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compared(small_run, tmp_path_factory):
    """The folder of a finished comparison in small, with 512 samples for each policy learning,
    and what `python -m lab.compare` printed."""
    folder = tmp_path_factory.mktemp("compare") / "run"
    shutil.copytree(small_run, folder)
    command = [sys.executable, "-m", "lab.compare", str(folder), "--samples", "512"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


# rows whose method uses the run's 256 labels
LABELLED = {"ppo-human", "ppo-ai", "dpo", "plain", "dpo-ai", "reinforce-human", "preferred-ft",
            "unlikelihood", "best-of-16", "best-of-128", "optimum-learned"}


def test_the_comparison_has_every_row_measured(compared):
    folder, out = compared
    comparison = read_json(folder / "rlhf.json")
    assert set(comparison["rows"]) == set(compare.TITLES)
    for name, row in comparison["rows"].items():
        assert compare.TITLES[name] in out
        for column in ("reward", "kl", "objective", "wellformed", "objective_all", "seconds"):
            assert math.isfinite(row[column]), (name, column)
        assert row["labels"] == (256 if name in LABELLED else 0), name
        generated = 0
        if name.startswith(("ppo", "reinforce")):
            generated = 512
        elif name.startswith("best"):
            generated = int(name.removeprefix("best-of-"))
        assert row["generated"] == generated, name
    assert (folder / "rlhf.png").stat().st_size > 20_000
    for who in ("human", "ai", "judge"):
        quality = comparison["reward_models"][who]
        assert 0 <= quality["accuracy"] <= quality["ceiling"] + 1e-12
        assert -1 <= quality["spearman"] <= 1
    ref = evaluate.exact_logps(Finished(folder).reference, world.prompts()[1])
    want = evaluate.optimum(ref, 1.0, 1.0)["objective"]
    assert comparison["rows"]["optimum"]["objective"] == pytest.approx(want)


def test_each_dpo_row_has_the_seconds_of_its_own_stage(compared):
    run = Finished(compared[0])
    rows = read_json(run.folder / "rlhf.json")["rows"]
    seconds = {name: compare.dpo_seconds(run, name) for name in ("dpo", "plain")}
    assert seconds["dpo"] != seconds["plain"]
    assert {name: rows[name]["seconds"] for name in seconds} == pytest.approx(seconds)


def test_every_row_counts_the_models_that_it_needs_in_memory(compared):
    """Policy and reference, a critic, and a judge that is a model. DPO looks the reference's
    log-probabilities up: it needs the policy alone."""
    rows = read_json(compared[0] / "rlhf.json")["rows"]
    want = {"ppo-human": 4, "ppo-ai": 4, "ppo-judge": 4, "ppo-true": 3, "reinforce-human": 3,
            "dpo": 1, "plain": 1, "dpo-ai": 1, "preferred-ft": 1, "unlikelihood": 1,
            "best-of-16": 2, "best-of-128": 2, "reference": 1, "optimum": 0,
            "optimum-learned": 0, "optimum-judge": 0}
    assert {name: row["models"] for name, row in rows.items()} == want


def exact(run):
    """The reference's log-probabilities, normalised, and the true rewards, (P,N) each."""
    ref = world.normalise(evaluate.exact_logps(run.reference, run.held_out))
    return ref, evaluate.held_out_rewards()


def test_no_method_is_above_the_frontier(compared):
    """The reward of every row, at its own KL, is at most the exact frontier's there (1e-6). Where
    all text counts alike nobody is better than pi*: no row has a larger J."""
    run = Finished(compared[0])
    rows = read_json(run.folder / "rlhf.json")["rows"]
    ref, r = exact(run)
    for name, row in rows.items():
        beta = world.beta_at_kl(ref, r, row["kl"])
        best = world.expected(world.optimal_policy(ref, r, beta), r).mean().item()
        above = row["reward"] - best
        assert above <= 1e-6, f"{name} is above the frontier by {above:g}"
        assert row["objective"] <= rows["optimum"]["objective"] + 1e-9, name


def test_a_second_call_trains_nothing_and_other_settings_are_refused(compared, monkeypatch,
                                                                     capsys):
    folder, out = compared
    monkeypatch.setattr(work, "processes", None)  # no process is needed
    files = list((folder / "rlhf").rglob("*.pt"))
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) == len(compare.pieces({}))
    compare.main([str(folder), "--samples", "512"])
    assert [file.stat().st_mtime_ns for file in files] == times
    same, again = out.split("Done in")[0], capsys.readouterr().out
    assert again.split("Done in")[0] == same, "the same figures and the same samples"
    with pytest.raises(SystemExit, match="samples = 512, not 1024.*remove that folder"):
        compare.main([str(folder), "--samples", "1024"])


# two places of the settings: a piece's own file, and the one file of all pieces in older versions
@pytest.mark.parametrize("place", ["rlhf/ppo-human", "rlhf"])
def test_work_of_a_reader_who_has_since_changed_a_default_is_refused(compared, tmp_path, place):
    folder = shutil.copytree(compared[0], tmp_path / "run")
    known = read_json(folder / "rlhf" / "ppo-human" / "settings.json")
    del known["judge"]
    if place != "rlhf":
        known["judge"] = "human"
    write_json(known | {"lr": 0.5}, folder / place / "settings.json")
    with pytest.raises(SystemExit) as error:
        compare.main([str(folder), "--samples", "512"])
    message = str(error.value)
    assert f"lr = 0.5, not {rlhf.Settings.lr}" in message and "clip" not in message


def test_the_work_of_an_older_version_counts_as_done(compared, tmp_path, monkeypatch):
    """Its pieces have a result and no settings of their own."""
    folder = shutil.copytree(compared[0], tmp_path / "run")
    for file in (folder / "rlhf").glob("*/settings.json"):
        file.unlink()
    monkeypatch.setattr(work, "processes", None)  # no process is needed
    work.do(compare.pieces({}), [folder])
    assert not list((folder / "rlhf").glob("*/settings.json")), "a piece was begun again"


def test_the_learned_rewards_optimum_is_exact_and_best_of_n_is_ranked_by_it(compared):
    """Two rows from their definitions: pi ~ ref exp(r_learned/beta), measured with r*, and the
    best of 16 samples of the reference by r_learned."""
    run = Finished(compared[0])
    rows = read_json(run.folder / "rlhf.json")["rows"]
    ref, r = exact(run)
    learned = judges.all_scores(run.reward_model("human"), run.held_out)
    tilted = torch.softmax(ref + learned / run.beta, -1)
    want = (tilted * r).sum(-1).mean().item()
    assert rows["optimum-learned"]["reward"] == pytest.approx(want, abs=1e-9)
    best = torch.stack([tabular.best_of_n(q, s, 16).exp() for q, s in zip(ref, learned)])
    want = (best * r).sum(-1).mean().item()
    assert rows["best-of-16"]["reward"] == pytest.approx(want, abs=1e-9)
