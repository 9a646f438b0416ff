"""The folder of a run: Run.steps with the smallest of models, and starting, continuing and reading
a run. How train.py uses it is proved in test_main.py, and the whole run in test_train.py."""
import hashlib
import math
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import support.run
from model import GPT, GPTConfig
from support import checkpoints, command
from support.files import read_json, read_jsonl, write_json
from support.run import Run, data_sha256, load_run, load_toy_run, lr_at, split, start
from tools import assert_same

# ---- Going through a training

def one_weight():
    """The smallest model, and an optimizer for it that has a memory. Its peak is 0.5."""
    model = torch.nn.Linear(1, 1).double()
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    return model, torch.optim.Adam(groups, lr=0.5)


def cosine(step, total, peak=0.5):
    """The learning rate of trainings too short for a warm-up of more than one step."""
    return peak * (1 + math.cos(math.pi * step / total)) / 2


def mean(values):
    return sum(values) / len(values)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only a test moves: clock.now."""
    clock = types.SimpleNamespace(now=1000.0)
    clock.time = lambda: clock.now
    monkeypatch.setattr(support.run, "time", clock)
    return clock


@pytest.fixture
def bars(monkeypatch):
    """The progress bars that were made."""
    made = []

    class Bar:
        def __init__(self, **settings):
            self.settings, self.steps, self.shown, self.written = settings, 0, [], []
            self.write = self.written.append
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self):
            self.steps += 1

        def set_postfix(self, values, refresh):
            assert refresh is False, "the bar is drawn anew at its own pace, not by every line"
            self.shown.append(values)
    monkeypatch.setattr(support.run, "tqdm", Bar)
    return made


@pytest.fixture
def saved(monkeypatch):
    """The steps of the states that were saved."""
    steps, save = [], checkpoints.save

    def note(state, path):
        steps.append(state["step"])
        save(state, path)
    monkeypatch.setattr(checkpoints, "save", note)
    return steps


def test_a_training_is_gone_through_step_by_step(tmp_path, monkeypatch, clock, bars):
    """11 batches of 5 texts in parts of 2, 2 and 1. Every step has its batch and its learning
    rate. There is a line for step 0, for every third step, and for the last one. A line holds the
    means over the steps since the line before (1e-12), the learning rate and the speed."""
    monkeypatch.setattr(support.run, "LOG_EVERY", 3)
    run, (model, optimizer) = Run(tmp_path / "some" / "where"), one_weight()
    assert not run.folder.exists(), "nothing is written before the first line"
    Run(run.folder).record(stage="before", step=5, loss=1.0)  # a folder may be there already
    plan = [[5 * i + k * k for k in range(5)] for i in range(11)]
    shown = ("loss", "rewards/margins", "not logged")
    steps = run.steps("some", model, optimizer, plan, 3, show=shown, unit="texts")
    for want, (step, parts) in enumerate(steps):
        batch = plan[want]
        assert step == want
        assert parts == [(0.4, batch[:2]), (0.4, batch[2:4]), (0.2, batch[4:])]
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(cosine(step, 11), abs=1e-12)
        for share, indices in parts:
            run.log(share, loss=torch.tensor(indices).double().mean())
        run.log(**{"rewards/margins": float(step)})
        clock.now += 2
        assert not run.state.exists(), "nothing is to be saved in so few steps"
    want = [{"stage": "before", "step": 5, "loss": 1.0}]
    values = []
    for covered in ([0], [1, 2], [3, 4, 5], [6, 7, 8], [9, 10]):
        loss, margin, last = mean([mean(plan[i]) for i in covered]), mean(covered), covered[-1]
        values.append({"loss": f"{loss:.3f}", "margins": f"{margin:.3f}"})
        want.append({"stage": "some", "step": last, "loss": pytest.approx(loss, abs=1e-12),
                     "rewards/margins": pytest.approx(margin, abs=1e-12),
                     "lr": pytest.approx(cosine(last, 11), abs=1e-12),
                     "texts_per_second": pytest.approx(5 / 2)})
    assert read_jsonl(run.folder / "metrics.jsonl") == want
    [bar] = bars
    assert bar.steps == 11 and bar.shown == values
    assert bar.settings == {"desc": "    some", "unit": "step", "initial": 0, "total": 11,
                            "dynamic_ncols": True}


def test_how_often_a_run_logs_and_saves(tmp_path, saved):
    """A line for every 10 steps, and a state for every 200. A batch is one part."""
    run, (model, optimizer) = Run(tmp_path), one_weight()
    for step, parts in run.steps("some", model, optimizer, [[7, 8]] * 202):
        assert parts == [(1.0, [7, 8])]
        run.log(loss=2.0)
        assert run.state.exists() == (step >= 200)
    rows = read_jsonl(run.metrics)
    assert [row["step"] for row in rows] == [0, *range(9, 200, 10), 201]
    assert {row["loss"] for row in rows} == {2.0}
    assert saved == [200] and not run.state.exists(), "a finished stage has nothing to continue"


def train_a_little(run, plan, interrupted_in=None, pressed_in=None):
    """A training of one_weight() on the numbers in plan. Returns the weights in the end.
    interrupted_in: it dies in this step. pressed_in: Ctrl-C is pressed in this step."""
    model, optimizer = one_weight()
    for step, [(_, numbers)] in run.steps("some", model, optimizer, plan):
        if step == pressed_in:
            command.note(None, None)
        loss = (model(torch.tensor(numbers).double()[:, None]) - 3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        run.log(loss=loss.float())
        if step == interrupted_in:
            return None
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def without_speed(rows):
    return [row | {"pairs_per_second": None} for row in rows]


def test_steps_continue_where_the_state_was_saved(tmp_path, monkeypatch, bars, saved):
    """Interrupted in step 3, before anything is saved, and in step 9, after the state of step 6.
    Weights and metrics are those of the run that was not interrupted, to the bit. So the weights,
    Adam's memory and the lines that will come again are right. Another stage leaves the state
    alone and begins with its first step."""
    monkeypatch.setattr(support.run, "SAVE_EVERY", 6)
    monkeypatch.setattr(support.run, "LOG_EVERY", 3)
    plan = [[i, i * i % 5] for i in range(14)]
    whole, folder = Run(tmp_path / "whole"), tmp_path / "run"
    for run in (whole, Run(folder)):
        run.record(stage="before", step=99)
    want = train_a_little(whole, plan)
    assert saved == [6, 12]
    for interrupted_in, first, saves in ((3, 0, []), (9, 0, [6]), (8, 6, []), (None, 6, [12])):
        saved.clear()
        weights = train_a_little(Run(folder), plan, interrupted_in)
        assert bars[-1].settings["initial"] == first and saved == saves
        if first == 0:
            assert next(Run(folder).steps("other", *one_weight(), plan))[0] == 0
    assert torch.equal(weights, want), "the continued run comes to other weights"
    rows = [without_speed(read_jsonl(run.metrics)) for run in (whole, Run(folder))]
    assert rows[0] == rows[1], "a line is lost, or comes twice"
    assert len(rows[0]) == 1 + 6


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    """Before the weights move. The message says in which step, with which learning rate, and where
    the rows come from: those of the part whose loss it is, else those of the batch, at most eight.
    It names state.pt where there is one. Any other value may be infinite: it moves no weight."""
    monkeypatch.setattr(support.run, "SAVE_EVERY", 3)
    run = Run(tmp_path, where=lambda i: f"mine.jsonl, line {i + 1}")
    plan = [[10 * step + i for i in range(9)] for step in range(8)]
    for step, parts in run.steps("some", *one_weight(), plan, accumulate=3):
        run.log(1 / 3, loss=0.5)
        run.log(1 / 3, loss=math.inf if step == 4 else 0.5, accuracy=math.nan)
        run.log(1 / 3, loss=0.5)
        run.log(grad_norm=torch.tensor(5.0))
        if step in (2, 4):
            with pytest.raises(SystemExit) as stopped:
                run.log(grad_norm=torch.tensor((math.nan, math.inf)[step == 4]))
            text = str(stopped.value)
            at = f"at a learning rate of {cosine(step, 8):g}. Rows: mine.jsonl, line"
            if step == 2:
                assert text.startswith(f"some, step 2: the gradient is not finite, {at} 21; ")
                assert "line 28, ..." in text and "line 29" not in text and "state" not in text
            else:
                assert text.startswith(f"some, step 4: the loss is inf, {at} 44; ")
                assert "line 46. Try a smaller learning rate" in text and "line 47" not in text
                assert text.endswith(f"which --resume continues, is in {run.state}.")
                assert run.state.exists()


class OnGPU(torch.Tensor):
    device = torch.device("cuda")


def test_on_a_gpu_it_stops_before_the_next_line_is_written(tmp_path, monkeypatch):
    """There nobody looks at a gradient in every step. The step, its rate and its rows are those of
    the first gradient that was no number. The lines and the saved state are from before it."""
    monkeypatch.setattr(support.run, "SAVE_EVERY", 4)
    monkeypatch.setattr(support.run, "LOG_EVERY", 3)
    run, seen = Run(tmp_path), []
    with pytest.raises(SystemExit) as stopped:
        for step, _ in run.steps("some", *one_weight(), [[i, 20 + i] for i in range(9)]):
            seen.append(step)
            norm = torch.tensor(1.0 if step < 6 else math.nan).as_subclass(OnGPU)
            run.log(loss=torch.tensor(0.5 if step < 6 else math.nan), grad_norm=norm)
    assert seen == list(range(8)), "a step waited for the GPU, or what is no number was saved"
    assert str(stopped.value).startswith(
        f"some, step 6: the loss is nan, at a learning rate of {cosine(6, 9):g}. Rows: 6; 26. Try")
    assert [row["step"] for row in read_jsonl(run.metrics)] == [0, 2, 5]
    assert checkpoints.load(run.state)["step"] == 4


def test_the_lines_of_a_run_on_the_side_are_taken_over(tmp_path):
    """They come behind the run's own. Done again, after an interruption, nothing comes twice. Where
    there is no such run nothing changes. Its folder goes, with all that an interruption left."""
    run, side = Run(tmp_path), Run(tmp_path / "side")
    run.take_over(side)
    assert not run.metrics.exists()
    for r, stage, step in ((run, "a", 0), (run, "a", 1), (side, "b", 0), (side, "b", 1)):
        r.record(stage=stage, step=step)
    half_done = run.metrics.read_bytes() + side.metrics.read_bytes()
    run.metrics.write_bytes(half_done)
    (side.folder / "writing-state.pt").write_bytes(b"half")
    for _ in range(2):
        run.take_over(side)
        assert not side.folder.exists()
        assert run.metrics.read_bytes() == half_done


def test_a_loss_that_stays_high_is_said_while_it_happens(tmp_path, monkeypatch, bars):
    """Once the loss has been above twice that of step 0 for three lines, it is said. It is said
    again only after it came down. A loss that jumps once, or stays at twice, is no reason."""
    monkeypatch.setattr(support.run, "LOG_EVERY", 1)
    losses = [0.7, 1.5, 1.5, 1.4, 1.5, 9, 9, 9, 9, 0.3, 2, 2, 2, 2]
    run = Run(tmp_path)
    for step, _ in run.steps("some", *one_weight(), [[0]] * len(losses)):
        run.log(loss=losses[step])
    assert [text.split(":")[0] for text in bars[-1].written] == ["some, step 6", "some, step 12"]
    assert "above 1.4, twice what it was at step 0. Is the learning rate, 0.5 " in (
        bars[-1].written[0])


def test_ctrl_c_ends_the_training_after_its_step(tmp_path, monkeypatch):
    """In any step, the state is saved, and the run that goes on comes to the same weights and the
    same lines as one that nobody interrupted, to the bit. Outside of a training, and the second
    time, Ctrl-C ends at once."""
    monkeypatch.setattr(support.run, "LOG_EVERY", 4)
    plan = [[i, i * i % 5] for i in range(9)]
    whole = Run(tmp_path / "whole")
    want = train_a_little(whole, plan)
    for pressed_in in range(8):
        run = Run(tmp_path / str(pressed_in))
        monkeypatch.setattr(command, "asked_to_stop", False)
        with pytest.raises(KeyboardInterrupt):
            train_a_little(run, plan, pressed_in=pressed_in)
        assert checkpoints.load(run.state)["step"] == pressed_in + 1
        assert command.trainings == []
        command.asked_to_stop = False
        assert torch.equal(train_a_little(run, plan), want), f"interrupted in {pressed_in}"
        rows = [without_speed(read_jsonl(r.metrics)) for r in (whole, run)]
        assert rows[0] == rows[1]
    monkeypatch.setattr(command, "trainings", [run])
    command.note(None, None)
    with pytest.raises(KeyboardInterrupt):
        command.note(None, None)
    monkeypatch.setattr(command, "asked_to_stop", False)
    command.trainings.clear()
    with pytest.raises(KeyboardInterrupt):
        command.note(None, None)


def test_the_files_of_another_run_are_refused(tmp_path):
    """state.pt and a checkpoint know the flags of their run."""
    run = Run(tmp_path, flags={"beta": 0.5})
    checkpoints.save({"flags": {"beta": 1.0}, "stage": "some"}, run.state)
    with pytest.raises(data.DataError, match="belongs to a run with other flags. Delete it"):
        next(run.steps("some", *one_weight(), [[0]]))
    model, file = GPT(GPTConfig(8, 9, n_layer=1, n_head=1, n_embd=8)), tmp_path / "sft.pt"
    checkpoints.save_model(model, file, flags={"beta": 1.0})
    with pytest.raises(data.DataError, match="sft.pt was written by a run with other flags"):
        run.load_model(file, "cpu")
    checkpoints.save_model(model, file, flags={"beta": 0.5})
    assert_same(run.load_model(file, "cpu").wte.weight, model.wte.weight, 0, what="the weights")


@given(st.integers(1, 60), st.integers(1, 70))
def test_the_parts_of_a_batch_have_shares_that_add_up(n, accumulate):
    """Its indices in order, in at most `accumulate` parts, none of them empty. A part's share is
    its part of the batch, so the shares add up to 1 (1e-12)."""
    indices = list(range(3, 3 + n))
    parts = split(indices, accumulate)
    assert sum([part for _, part in parts], []) == indices
    assert 1 <= len(parts) <= accumulate
    assert all(part and share == len(part) / n for share, part in parts)
    assert sum(share for share, _ in parts) == pytest.approx(1, abs=1e-12)


def test_learning_rate_warms_up_and_goes_to_zero():
    """30 of 1,000 steps up in a line, then down a cosine. A short training begins at its peak."""
    for step, total, want in ((0, 1000, 2 / 30), (14, 1000, 1), (250, 1000, 1 + 0.5 ** 0.5),
                              (500, 1000, 1), (750, 1000, 1 - 0.5 ** 0.5), (0, 10, 2), (5, 10, 1)):
        assert lr_at(step, total, 2.0) == pytest.approx(want, rel=1e-12), f"{step} of {total}"
    rates = [lr_at(step, 1000, 2.0) for step in range(1000)]
    assert rates.index(max(rates)) in (28, 29) and 0 < rates[-1] < 1e-4


# ---- Starting a run

def test_a_run_is_started_once_and_continued_with_its_flags(tmp_path, capsys):
    """A new folder; an unfinished run without --resume, with other flags, and with its own; and a
    finished one. Every flag that differs is named with both values. Nothing is written before
    begin()."""
    folder, flags = tmp_path / "run", {"data": None, "beta": 0.5, "batch_size": 8, "seed": 3}
    run = start(folder, flags, resume=False)
    assert run.folder == folder and run.flags == flags and not folder.exists()
    run.begin()
    assert read_json(folder / "flags.json") == flags
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="unfinished run. Continue it with --resume"):
        start(folder, flags, resume=False)
    with pytest.raises(SystemExit) as refused:
        start(folder, flags | {"beta": 1.0, "batch_size": 9}, resume=True)
    assert str(refused.value).endswith("--beta was 0.5, is 1.0; --batch-size was 8, is 9")
    assert start(folder, flags, resume=True).folder == folder
    assert read_json(folder / "flags.json") == flags
    assert capsys.readouterr().out == ""
    write_json({}, folder / "summary.json")
    for resume in (False, True):
        with pytest.raises(SystemExit, match="finished run, which is not overwritten"):
            start(folder, flags, resume)
    start(tmp_path / "new", flags, resume=True)
    assert capsys.readouterr().out.startswith(f"Nothing to resume in {tmp_path / 'new'}:")


def test_a_run_is_continued_on_the_data_that_it_was_begun_with(tmp_path, monkeypatch):
    """The whole path and the hash of the file are kept. A changed file is refused, and so is one
    that cannot be read. The caller's flags stay as they are."""
    (tmp_path / "mine.jsonl").write_text("a pair", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    flags = {"data": "mine.jsonl", "seed": 3}
    start(tmp_path / "run", flags, resume=False).begin()
    assert flags == {"data": "mine.jsonl", "seed": 3}
    kept = {"data": str(tmp_path.resolve() / "mine.jsonl"), "seed": 3,
            "data_sha256": hashlib.sha256(b"a pair").hexdigest()}
    assert read_json(tmp_path / "run" / "flags.json") == kept
    start(tmp_path / "run", flags, resume=True)
    (tmp_path / "mine.jsonl").write_text("another pair", encoding="utf-8")
    with pytest.raises(SystemExit, match="mine.jsonl has changed since the run in .*run began"):
        start(tmp_path / "run", flags, resume=True)
    with pytest.raises(data.DataError, match="absent.jsonl: cannot be read"):
        data_sha256("absent.jsonl")


# ---- Reading a finished run

FLAGS = {"data": None, "annotator": "human", "tokenizer": "toy", "seed": 3}


@pytest.fixture
def finished(tmp_path):
    """A run's folder with untrained models, and the models."""
    models = {}
    for name in ("sft", "plain", "dpo"):
        models[name] = GPT(GPTConfig(8, 9, n_layer=1, n_head=1, n_embd=8))
        facts = {"reference": checkpoints.fingerprint(models["sft"])} if name != "sft" else {}
        checkpoints.save_model(models[name], tmp_path / f"{name}.pt", **facts)
    write_json(FLAGS, tmp_path / "flags.json")
    return tmp_path, models


def test_a_finished_run_is_read_with_its_models(finished):
    """In eval mode, with plain DPO or without it."""
    folder, models = finished
    for names in (["sft", "plain", "dpo"], ["sft", "dpo"]):
        for read in (load_run, load_toy_run):
            flags, tokenizer, found = read(str(folder))
            assert flags == FLAGS and tokenizer is data.get_tokenizer("toy")
            assert list(found) == names
            for name, model in found.items():
                assert not model.training
                assert_same(model.wte.weight, models[name].wte.weight, 0, what=name)
        (folder / "plain.pt").unlink(missing_ok=True)


def test_a_folder_without_a_run_says_how_to_make_one(finished):
    folder, _ = finished
    for missing in ("dpo.pt", "flags.json"):
        (folder / missing).unlink()
        with pytest.raises(SystemExit) as refused:
            load_run(folder)
        assert f"(no {missing}); make one with: python train.py --out-dir" in str(refused.value)


@pytest.mark.parametrize("name", ["plain", "dpo"])
def test_a_policy_is_not_measured_against_another_reference(finished, name):
    """The reference was replaced, or a policy was."""
    folder, models = finished
    checkpoints.save_model(models[name], folder / f"{name}.pt",
                           reference=checkpoints.fingerprint(models[name]))
    with pytest.raises(SystemExit, match=f"{name}.pt was trained against another reference"):
        load_run(folder)


@pytest.mark.parametrize("changes, message", [
    ({"annotator": "ai"}, "was trained with --annotator ai; this needs the toy world"),
    ({"data": "mine.jsonl"}, "was trained with --data; this needs the toy world"),
])
def test_a_run_without_a_known_optimum_is_no_toy_run(finished, changes, message):
    folder, _ = finished
    write_json(FLAGS | changes, folder / "flags.json")
    assert load_run(folder)[0] == FLAGS | changes
    with pytest.raises(SystemExit, match=message):
        load_toy_run(folder)
