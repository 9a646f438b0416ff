"""A default run for each of three seeds: where it is, and what was found on it."""
import subprocess
import sys
from pathlib import Path

from lab import work
from support.files import read_json
from support.statistics import mean_and_se

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "out" / "paper"
SEEDS = (0, 1, 2)


def folder(seed):
    return WORK / f"seed-{seed}"


def command(*words):
    """Run a command of the project. It shows its progress bars, and nothing else."""
    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(out_dir, *flags):
    """Run train.py with these flags, or the rest of it if it was interrupted. Its summary."""
    if not (out_dir / "summary.json").exists():
        resume = ["--resume"] if out_dir.exists() else []
        command("train.py", "--out-dir", str(out_dir), *flags, *resume)
    return read_json(out_dir / "summary.json")


def make_runs():
    """train.py and lab.compare, for each seed."""
    for seed in SEEDS:
        train(folder(seed), "--seed", str(seed))
        if not (folder(seed) / "rlhf.json").exists():
            command("-m", "lab.compare", str(folder(seed)))


def result(seed, piece):
    """What a piece of work has found. A text is the name of a row of lab.compare."""
    if isinstance(piece, str):
        return read_json(folder(seed) / "rlhf.json")["rows"][piece]
    return work.result(folder(seed), piece.name)


def select(rows, **where):
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def over_seeds(rows, column, key):
    """(settings, means, standard errors) of a column, for each value of key, in their order."""
    settings = list(dict.fromkeys(row[key] for row in rows))
    means, errors = [], []
    for setting in settings:
        mean, error = mean_and_se([row[column] for row in select(rows, **{key: setting})])
        means.append(mean)
        errors.append(error)
    return settings, means, errors
