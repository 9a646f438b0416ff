"""Accidents by the dozen: runs that are killed, and disks that are full. Each run goes on with
--resume, and must end as a run that nobody disturbed, to the bit.

    python tests/accidents.py --kills 20          killed at random moments, some runs twice
    python tests/accidents.py --full-disk 20      every write of a run in turn, at most 20 of them
    python tests/accidents.py --small-disk DIR    DIR is a disk of its own; it is filled up first

tests/test_accidents.py does a few of each.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from support.checkpoints import fingerprint, load_model  # noqa: E402
from support.files import read_jsonl  # noqa: E402

# A small run of train.py that saves often. fail: the number of the write that fails, from 0.
DRIVER = """
import sys
import support.files, support.run, train
from support import command, machine
machine.check = lambda *args: None  # it would refuse a disk that is small from the beginning
fail, steps, texts = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
support.run.SAVE_EVERY, support.run.LOG_EVERY, train.SFT_TEXTS = steps, 5, texts
writes = 0

def count(path):
    global writes
    writes += 1
    print("write", writes - 1, path.name, flush=True)
    if writes - 1 == fail:
        with open(path, "r+b") as f:  # as much as the disk had room for
            f.truncate(path.stat().st_size - 9)
        raise OSError(28, "No space left on device", str(path))

replace, append = support.files.os.replace, support.run.append_jsonl

def count_replace(beside, path):
    count(beside)
    replace(beside, path)

def count_append(row, path):
    append(row, path)
    count(path)

support.files.os.replace, support.run.append_jsonl = count_replace, count_append
command.run(lambda: train.main(sys.argv[4:]))
"""
SMALL = ["--pairs", "640", "--epochs", "1", "--batch-size", "32", "--n-embd", "32",
         "--device", "cpu"]
NOT_COMPARED = ("seconds", "texts_per_second", "pairs_per_second")


def begin(folder, *flags, fail=-1, save_every=4, texts=640, stderr=subprocess.PIPE):
    """Start the run. A subprocess.Popen whose output is captured."""
    words = [sys.executable, "-c", DRIVER, str(fail), str(save_every), str(texts), *SMALL,
             "--out-dir", str(folder), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=stderr, encoding="utf-8")


def finish(folder, *flags, **settings):
    """The run to its end: (exit code, what it printed, what it said of errors)."""
    process = begin(folder, *flags, **settings)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def result(folder):
    """All that a run leaves, but for times: weights, metrics, summary, and the names of files."""
    rows = read_jsonl(folder / "metrics.jsonl")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    models = {name: fingerprint(load_model(folder / f"{name}.pt")[0])
              for name in ("sft", "plain", "dpo")}
    return {"files": sorted(f.name for f in folder.iterdir()), "models": models,
            "metrics": [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows],
            "summary": {k: v for k, v in summary.items() if k not in NOT_COMPARED}}


def kill(folder, write, seconds):
    """Begin or continue the run, and kill it so many seconds after a write. What it had left."""
    process = begin(folder, "--resume", stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith(f"write {write} "):
            time.sleep(seconds)
            break
    process.kill()
    process.communicate()
    return " ".join(sorted(f.name for f in folder.glob("*.*")))


def kills(number, seed=0):
    """Yield (what was there when it was killed, whether it ended like a run that was not)."""
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        code, out, err = finish(Path(folder) / "whole")
        assert code == 0, err
        writes, want = out.count("\nwrite "), result(Path(folder) / "whole")
        for i in range(number):
            run, left = Path(folder) / str(i), writes
            killed = []
            for _ in range(1 + i % 2):
                write = choose.randrange(left)
                left = writes - write  # the second time, less is ahead
                killed.append(kill(run, write, choose.uniform(0, 0.3)))
            while (run / "summary.json").exists():  # it had ended before it was killed: sooner
                shutil.rmtree(run)
                write //= 2
                killed = [kill(run, write, 0)]
            code, _, err = finish(run, "--resume")
            assert code == 0, err
            yield "; then ".join(killed), result(run) == want


def full_disks(number, seed=0):
    """Yield (the write that failed, what was said, whether the run went on to the same end)."""
    with tempfile.TemporaryDirectory() as folder:
        code, out, err = finish(Path(folder) / "whole")
        assert code == 0, err
        want = result(Path(folder) / "whole")
        writes = [line.split()[1:] for line in out.splitlines() if line.startswith("write ")]
        chosen = writes if number >= len(writes) else random.Random(seed).sample(writes, number)
        for i, name in chosen:
            run = Path(folder) / i
            code, _, err = finish(run, fail=int(i))
            said = [line for line in err.splitlines() if "error" in line or "resume" in line]
            good = code == 1 and "Traceback" not in err and "No space left" in err
            code, _, err = finish(run, "--resume")
            yield name, " ".join(said)[-150:], good and code == 0 and result(run) == want


def small_disk(disk):
    """The same with a real disk: with ever more room on it, until the run fits."""
    disk = Path(disk)
    with tempfile.TemporaryDirectory() as folder:
        code, _, err = finish(Path(folder) / "whole")
        assert code == 0, err
        want = result(Path(folder) / "whole")
    filler, room = disk / "filler", 0
    while True:
        with open(filler, "wb") as f:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            f.write(b"0" * max(0, free - room))
        code, _, err = finish(disk / "run")
        if code == 0:
            return
        names = sorted(x.name for x in (disk / "run").glob("*"))
        filler.unlink()
        good = code == 1 and "Traceback" not in err
        code, _, err = finish(disk / "run", "--resume")
        yield f"{room // 1024} kB", ", ".join(names), good and code == 0 and (
            result(disk / "run") == want)
        for file in (disk / "run").iterdir():
            file.unlink()
        (disk / "run").rmdir()
        room += 64 * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--full-disk", type=int, default=0)
    parser.add_argument("--small-disk", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ends = []
    for where, same in kills(args.kills, args.seed) if args.kills else ():
        ends.append(same)
        print("killed with:", where, "->", "same" if same else "ANOTHER END", flush=True)
    disks = [full_disks(args.full_disk, args.seed)] if args.full_disk else []
    disks += [small_disk(args.small_disk)] if args.small_disk else []
    for disk in disks:
        for where, said, same in disk:
            ends.append(same)
            print("full at", where, "|", said, "->", "same" if same else "WRONG", flush=True)
    print(f"{sum(ends)} of {len(ends)} ended as the run that nobody disturbed.")
    return 0 if all(ends) else 1


if __name__ == "__main__":
    raise SystemExit(main())
