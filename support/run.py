"""The folder of a run: its flags, its metrics, saving and resuming, and reading a finished one.

A training loop goes through `Run.steps`, which does everything that is not the algorithm.
"""
import math
import os
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
from support import checkpoints, command, processes
from support.files import append_jsonl, read_json, read_jsonl, sha256, write_json, write_jsonl

SAVE_EVERY = 200  # steps between two savings of what --resume continues from
LOG_EVERY = 10  # steps that one line of metrics.jsonl is the mean of


def lr_at(step, total, peak):
    """Linear warm-up over the first 3% of the steps, then a cosine down to 0."""
    warmup = max(1, round(0.03 * total))
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))


class Run:
    """A folder that a training writes to: metrics.jsonl, and state.pt while it runs.

    flags: the run's flags, a dict of plain values. where: a function from the index of a text or
    pair to the place it comes from, for messages.
    """

    def __init__(self, folder, flags=None, where=None):
        self.folder, self.flags, self.where = Path(folder), flags or {}, where
        self.metrics = self.folder / "metrics.jsonl"
        self.state = self.folder / "state.pt"

    def begin(self):
        """Write the flags. Nothing is written before, so that a failed start leaves no folder."""
        if processes.rank() == 0:
            write_json(self.flags, self.folder / "flags.json")

    def load_model(self, file, device):
        """A model that this run has written before. Raises DataError where another run has."""
        model, facts = checkpoints.load_model(file, device)
        if facts.get("flags") != self.flags:
            raise data.DataError(f"{file} was written by a run with other flags. Delete it, and "
                                 "--resume makes it again.")
        return model

    def record(self, **row):
        """Append a line to metrics.jsonl."""
        if processes.rank() == 0:
            append_jsonl(row, self.metrics)

    def log(self, share=None, **values):
        """Values of the step at hand, means over `share` of its batch. Every LOG_EVERY steps
        their mean becomes a line of metrics.jsonl."""
        if share is None:  # the same in each process
            share = 1 / processes.size()
        for name, value in values.items():
            value = torch.as_tensor(value).detach()
            self.sums[name] = self.sums.get(name, 0.0) + value * share
            if name == "loss":
                self.losses.append(value)
            if name == "grad_norm":
                self.unchecked.append((self.at, self.lr, self.parts, self.losses, value))
                if value.device.type == "cpu":
                    self.check()

    def check(self):
        """Raises SystemExit where a gradient is infinite or no number. Whoever looks at a number
        waits for the GPU. So there this is done only before something is written."""
        steps, self.unchecked = self.unchecked, []
        for step in steps:
            if not torch.isfinite(step[-1]):
                raise SystemExit(self.not_finite(*step))

    def not_finite(self, at, lr, parts, losses, _):
        """What to say of a step whose gradient is infinite or no number."""
        rows, what = [i for _, part in parts for i in part], "the gradient is not finite"
        for loss, (_, part) in zip(losses, parts):
            if not torch.isfinite(loss):
                rows, what = part, f"the loss is {loss.item():g}"
                break
        places = [self.where(i) if self.where else str(i) for i in rows[:8]]
        more = ", ..." if len(rows) > 8 else ""
        saved = ""
        if self.state.exists():
            saved = f" The state before, which --resume continues, is in {self.state}."
        return (f"{at}: {what}, at a learning rate of {lr:g}. Rows: "
                f"{'; '.join(places)}{more}. Try a smaller learning rate in "
                f"another folder, and look at these rows.{saved}")

    def steps(self, stage, model, optimizer, plan, accumulate=1, show=("loss",), unit="pairs"):
        """Go through plan, a list of batches of indices: yield (step, parts) for each.

        parts: a list of (share, indices), this process's part of the batch in `accumulate` parts
        that fit in memory. The caller makes the update. Around it the learning rate is set, with
        the optimizer's own as its peak; what was logged is written, and shown if `show` names it;
        and every SAVE_EVERY steps, and where the user interrupts, all is saved. Order and learning
        rate depend on the step alone, so a run that is continued is the run that was not
        interrupted.
        """
        peak, total = optimizer.defaults["lr"], len(plan)
        processes.wait()  # the first process has done with the stage before
        self.sums, self.unchecked, count, first, since = {}, [], 0, 0, time.time()
        if saved := self.restore(stage, model, optimizer):
            first, count, since = saved["step"], saved["count"], since - saved["seconds"]
            if processes.rank() == 0:  # it holds the sums of all
                self.sums = {name: torch.tensor(v) for name, v in saved["sums"].items()}
        kept = [r for r in read_jsonl(self.metrics) if r["stage"] != stage or r["step"] < first]
        if processes.rank() == 0:
            write_jsonl(kept, self.metrics)  # the lines after the last saving will come again
        logged = [r["loss"] for r in kept if r["stage"] == stage and "loss" in r]
        command.trainings.append(self)
        try:
            with tqdm(desc=f"{stage:>8}", unit="step", initial=first, total=total,
                      dynamic_ncols=True) as bar:
                for step in range(first, total):
                    stop = processes.any_of(command.asked_to_stop)
                    if step > first and (step % SAVE_EVERY == 0 or stop):
                        self.check()
                        checkpoints.save({
                            "stage": stage, "step": step, "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(), "random": torch.get_rng_state(),
                            "sums": self.totals(), "count": count, "seconds": time.time() - since,
                            "flags": self.flags}, self.state)
                    if stop:
                        raise KeyboardInterrupt
                    self.at, self.lr = f"{stage}, step {step}", lr_at(step, total, peak)
                    for group in optimizer.param_groups:
                        group["lr"] = self.lr
                    self.parts, self.losses = split(plan[step], accumulate), []
                    yield step, self.parts
                    count += 1
                    bar.update()
                    # step 0 has a line of its own: it shows the model before any update
                    if step == 0 or (step + 1) % LOG_EVERY == 0 or step + 1 == total:
                        self.check()
                        values = {name: v / count for name, v in self.totals().items()}
                        speed = count * len(plan[step]) / (time.time() - since)
                        self.record(stage=stage, step=step, **values, lr=self.lr,
                                    **{f"{unit}_per_second": speed})
                        bar.set_postfix(shown(values, show), refresh=False)
                        logged.append(values.get("loss", 0.0))
                        if stays_high(logged):
                            bar.write(f"{self.at}: the loss stays above {2 * logged[0]:.3g}, "
                                      f"twice what it was at step 0. Is the learning rate, "
                                      f"{peak:g} at its peak, too large?")
                        self.sums, count, since = {}, 0, time.time()
        finally:
            command.trainings.remove(self)
        if processes.rank() == 0:
            self.state.unlink(missing_ok=True)

    def take_over(self, side):
        """Put the metrics of a run in a folder inside this one's behind its own, in place of any
        that it has of that stage. The folder goes."""
        rows = read_jsonl(side.metrics)
        if rows and processes.rank() == 0:
            own = [r for r in read_jsonl(self.metrics) if r["stage"] != rows[0]["stage"]]
            write_jsonl(own + rows, self.metrics)
            shutil.rmtree(side.folder)

    def totals(self):
        """What was logged since the last line, added up over steps and processes."""
        return processes.add_up_numbers({name: float(v) for name, v in self.sums.items()})

    def restore(self, stage, model, optimizer):
        """Load state.pt where it belongs to this stage, and return it. None where there is none.
        Raises DataError where another run has written it."""
        if not self.state.exists():
            return None
        state = checkpoints.load(self.state)
        if state.get("flags") != self.flags:
            raise data.DataError(f"{self.state} belongs to a run with other flags. Delete it, and "
                                 "--resume goes on from the last stage that was finished.")
        if state["stage"] != stage:
            return None
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])  # it moves its tensors to the model's device
        torch.set_rng_state(state["random"])
        return state


def stays_high(losses, lines=3):
    """Whether the last lines are the first ones that are all above twice the first loss."""
    high = [loss > 2 * losses[0] for loss in losses]
    return len(high) > lines and all(high[-lines:]) and not high[-lines - 1]


def shown(values, names):
    """The named values as short texts, for a progress bar."""
    return {name.split("/")[-1]: f"{values[name]:.3f}" for name in names if name in values}


def split(batch, accumulate):
    """This process's part of a batch in `accumulate` parts: a list of (share of the whole batch,
    indices)."""
    indices = processes.mine(batch)
    size = max(1, math.ceil(len(indices) / accumulate))
    parts = [indices[i:i + size] for i in range(0, len(indices), size)]
    return [(len(part) / len(batch), part) for part in parts]


def start(folder, flags, resume):
    """The Run of a new folder, or of one that an interrupted run of the same flags has left.
    Raises SystemExit where the folder holds anything else. Writes nothing. flags: a dict of plain
    values."""
    flags = dict(flags)
    if flags["data"] is not None:
        # a run is continued and measured on the data that it was begun with
        flags["data"] = str(Path(flags["data"]).resolve())
        flags["data_sha256"] = data_sha256(flags["data"])
    run, file = Run(folder, flags), folder / "flags.json"
    if processes.rank() > 0:  # the first process looks, and may have begun to write
        return run
    if (folder / "summary.json").exists():
        raise SystemExit(f"{folder} holds a finished run, which is not overwritten; see it with: "
                         f"python evaluate.py {folder}\nTo train again, choose another --out-dir.")
    if file.exists():
        if not resume:
            raise SystemExit(f"{folder} holds an unfinished run. Continue it with --resume, "
                             "or choose another --out-dir.")
        before = read_json(file)
        if before.get("data_sha256") != flags.get("data_sha256"):
            raise SystemExit(f"{flags['data']} has changed since the run in {folder} began with "
                             f"{before['data']}. Begin anew in another --out-dir.")
        different = []
        for key, value in flags.items():
            if before.get(key) != value:
                flag = f"--{key.replace('_', '-')}"
                different.append(f"{flag} was {before.get(key)!r}, is {value!r}")
        if different:
            raise SystemExit(f"--resume continues a run with the flags it was started with; "
                             f"in {folder} " + "; ".join(different))
    elif resume:
        print(f"Nothing to resume in {folder}: starting from the beginning.")
    return run


def read_flags(folder):
    """The flags of a finished run of train.py. Raises SystemExit where there is none."""
    for name in ("flags.json", "sft.pt", "dpo.pt"):
        if not os.path.exists(os.path.join(folder, name)):  # unlike Path's, it takes any name
            raise SystemExit(f"{folder} holds no finished run (no {name}); make one with: python "
                             f"train.py --out-dir {folder}, and --resume where it was begun")
    return read_json(Path(folder) / "flags.json")


def load_run(folder, device="cpu"):
    """(flags, tokenizer, models) of a finished run of train.py. Raises SystemExit where there is
    none. models: {"sft": GPT, "dpo": GPT, perhaps "plain": GPT}, in eval mode."""
    flags, models = read_flags(folder), {}
    for name in ("sft", "plain", "dpo"):
        path = Path(folder) / f"{name}.pt"
        if not path.exists():
            continue
        models[name], facts = checkpoints.load_model(path, device)
        models[name].eval()
        if name != "sft" and facts.get("reference") != checkpoints.fingerprint(models["sft"]):
            raise SystemExit(f"{path} was trained against another reference than sft.pt beside "
                             "it: log-ratios of the two mean nothing")
    return flags, data.get_tokenizer(flags["tokenizer"]), models


def load_toy_run(folder, device="cpu"):
    """`load_run` of a run on the toy world with human labels. Other runs have no known optimum."""
    flags = read_flags(folder)
    other = "data" if flags["data"] else f"annotator {flags['annotator']}"
    if flags["data"] is not None or flags["annotator"] != "human":
        raise SystemExit(f"{folder} was trained with --{other}; this needs the toy world, where "
                         "the true reward is known, and human labels")
    return load_run(folder, device)


def data_sha256(path):
    try:
        return sha256(path)
    except OSError as error:
        raise data.DataError(f"{path}: cannot be read ({error})") from error
