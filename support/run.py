"""The folder of a run: its flags, its metrics, saving and resuming, and reading a finished one.

A training loop goes through `Run.steps`, which does everything that is not the algorithm.
"""
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
from support import checkpoints
from support.files import append_jsonl, read_json, read_jsonl, sha256, write_json, write_jsonl

SAVE_EVERY = 200  # steps between two savings of what --resume continues from
LOG_EVERY = 10  # steps that one line of metrics.jsonl is the mean of


def lr_at(step, total, peak):
    """Linear warm-up over the first 3% of the steps, then a cosine down to 0."""
    warmup = max(1, round(0.03 * total))
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))


class Run:
    """A folder that a training writes to: metrics.jsonl, and state.pt while it runs."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = self.folder / "metrics.jsonl"
        self.state = self.folder / "state.pt"

    def record(self, **row):
        """Append a line to metrics.jsonl."""
        append_jsonl(row, self.metrics)

    def log(self, share=1.0, **values):
        """Values of the step at hand, means over `share` of its batch. Every LOG_EVERY steps
        their mean becomes a line of metrics.jsonl."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach() * share
            self.sums[name] = self.sums.get(name, 0.0) + value
            if name == "grad_norm" and not torch.isfinite(value):
                saved = f"is in {self.state}" if self.state.exists() else "was not saved"
                raise SystemExit(f"{self.at}: the gradient is not finite. The usual cure is a "
                                 f"smaller learning rate than {self.lr:g}. The state before "
                                 f"{saved}.")

    def steps(self, stage, model, optimizer, plan, accumulate=1, show=("loss",), unit="pairs"):
        """Go through plan, a list of batches of indices: yield (step, parts) for each.

        parts: a list of (share, indices), the batch in `accumulate` parts that fit in memory. The
        caller makes the update. Around it the learning rate is set, with the optimizer's own as
        its peak; what was logged is written, and shown if `show` names it; and every SAVE_EVERY
        steps all is saved. Order and learning rate depend on the step alone, so a run that is
        continued is the run that was not interrupted.
        """
        peak, total = optimizer.defaults["lr"], len(plan)
        first = self.restore(stage, model, optimizer)
        kept = [r for r in read_jsonl(self.metrics) if r["stage"] != stage or r["step"] < first]
        write_jsonl(kept, self.metrics)  # the lines after the last saving will come again
        self.sums, count, since = {}, 0, time.time()
        with tqdm(desc=f"{stage:>8}", unit="step", initial=first, total=total,
                  dynamic_ncols=True) as bar:
            for step in range(first, total):
                if step > first and step % SAVE_EVERY == 0:
                    state = {"stage": stage, "step": step, "model": model.state_dict(),
                             "optimizer": optimizer.state_dict()}
                    checkpoints.save(state, self.state)
                self.at, self.lr = f"{stage}, step {step}", lr_at(step, total, peak)
                for group in optimizer.param_groups:
                    group["lr"] = self.lr
                yield step, split(plan[step], accumulate)
                count += 1
                bar.update()
                # step 0 has a line of its own: it shows the model before any update
                if step == 0 or (step + 1) % LOG_EVERY == 0 or step + 1 == total:
                    values = {name: float(v) / count for name, v in self.sums.items()}
                    speed = count * len(plan[step]) / (time.time() - since)
                    self.record(stage=stage, step=step, **values, lr=self.lr,
                                **{f"{unit}_per_second": speed})
                    bar.set_postfix(shown(values, show), refresh=False)
                    self.sums, count, since = {}, 0, time.time()
        self.state.unlink(missing_ok=True)

    def restore(self, stage, model, optimizer):
        """Load state.pt where it belongs to this stage. Returns the step to go on with."""
        if not self.state.exists():
            return 0
        state = checkpoints.load(self.state, device=next(model.parameters()).device)
        if state["stage"] != stage:
            return 0
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]


def shown(values, names):
    """The named values as short texts, for a progress bar."""
    return {name.split("/")[-1]: f"{values[name]:.3f}" for name in names if name in values}


def split(indices, accumulate):
    """A batch in `accumulate` parts: a list of (share of the batch, indices)."""
    size = math.ceil(len(indices) / accumulate)
    parts = [indices[i:i + size] for i in range(0, len(indices), size)]
    return [(len(part) / len(indices), part) for part in parts]


def start(folder, flags, resume):
    """The Run of a new folder, or of one that an interrupted run of the same flags has left.
    Raises SystemExit where the folder holds anything else. flags: a dict of plain values."""
    flags = dict(flags)
    if flags["data"] is not None:
        # a run is continued and measured on the data that it was begun with
        flags["data"] = str(Path(flags["data"]).resolve())
        flags["data_sha256"] = data_sha256(flags["data"])
    file = folder / "flags.json"
    if (folder / "summary.json").exists():
        raise SystemExit(f"{folder} holds a finished run, which is not overwritten; see it with: "
                         f"python evaluate.py {folder}\nTo train again, choose another --out-dir.")
    if file.exists():
        if not resume:
            raise SystemExit(f"{folder} holds an unfinished run. Continue it with --resume, "
                             "or choose another --out-dir.")
        before = read_json(file)
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
    run = Run(folder)
    write_json(flags, file)
    return run


def load_run(folder, device="cpu"):
    """(flags, tokenizer, models) of a finished run of train.py. Raises SystemExit where there is
    none. models: {"sft": GPT, "dpo": GPT, perhaps "plain": GPT}, in eval mode."""
    folder = Path(folder)
    file = folder / "flags.json"
    if not file.exists() or not (folder / "dpo.pt").exists():
        missing = "dpo.pt" if file.exists() else "flags.json"
        raise SystemExit(f"{folder} holds no finished run (no {missing}); make one "
                         f"with: python train.py --out-dir {folder}")
    flags = read_json(file)
    models = {}
    for name in ("sft", "plain", "dpo"):
        path = folder / f"{name}.pt"
        if not path.exists():
            continue
        models[name], facts = checkpoints.load_model(path, device)
        models[name].eval()
        if name != "sft" and not checkpoints.is_fingerprint(facts["reference"], models["sft"]):
            raise SystemExit(f"{path} was trained against another reference than "
                             f"{folder / 'sft.pt'}: log-ratios of the two mean nothing")
    return flags, data.get_tokenizer(flags["tokenizer"]), models


def load_toy_run(folder, device="cpu"):
    """`load_run` of a run on the toy world with human labels. Other runs have no known optimum."""
    flags, tokenizer, models = load_run(folder, device)
    other = "data" if flags["data"] else f"annotator {flags['annotator']}"
    if flags["data"] is not None or flags["annotator"] != "human":
        raise SystemExit(f"{folder} was trained with --{other}; this needs the toy world, where "
                         "the true reward is known, and human labels")
    return flags, tokenizer, models


def data_sha256(path):
    try:
        return sha256(path)
    except OSError as error:
        raise data.DataError(f"{path}: cannot be read ({error})") from error


def pick_device(name):
    """"auto" is cuda where there is one, else mps, else the CPU."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
