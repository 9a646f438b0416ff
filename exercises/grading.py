"""Test your own functions with the project's proofs.

    python -m pytest --impl exercises/dpo.py          every function of a file; -v: every proof
    from exercises.grading import grade               in a notebook: the functions you have so far
    grade(dpo_loss=my_dpo_loss)
    python -m exercises.grading > mine.py             a new file with the stubs

A stub is a function with a signature and a docstring, and nothing else. A proof is a test that
carries @grades("function"). The proofs are run with your functions in the place of the project's
own. There are three verdicts on each function. They stand apart:

    right    its numbers and gradients are right
    guards   it refuses what it must refuse. @grades("function", guard="what is refused")
    cost     it does nothing more often than needed. @grades("function", cost=True)

A file is graded in a process of its own, exercises/judge.py, which may hang or end.
"""
import argparse
import ast
import contextlib
import inspect
import json
import linecache
import math
import os
import queue
import re
import secrets
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from exercises.judge import FUNCTIONS, ROOT, Judge, new_verdict, run

# ---- The stubs

STUBS = '''"""Your own DPO. Each function has a signature, and a docstring says what it must do.

Write one function, and see what the project's proofs say about it:

    python -m pytest --impl exercises/dpo.py

Begin at the top. A function uses only functions that stand before it. No function changes its
arguments; central_differences moves x, and puts it back. float64 stays float64. Where a ValueError
is asked for, its wording is yours.

B pairs, T tokens, V vocabulary, C channels. h is what preference_logits returns, sigma is the
logistic function, and all logarithms are in nats. The equation numbers are those of
https://arxiv.org/abs/2305.18290v3.
"""
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
'''

# the headings of the stubs: each stands before the function that it is named for
HEADINGS = {
    "token_logps": "# ---- Log-probabilities of responses",
    "preference_logits": "# ---- The loss",
    "gradient_weight": "# ---- The gradient, by hand",
    "central_differences": "# ---- The gradient check: three ways to the same numbers",
    "cdpo_loss": "# ---- Variants of the loss. Each is called as dpo_loss is, returns what it\n"
                 "# returns, and raises a ValueError where it does.",
    "missing_mass": "# ---- What the loss does not see",
}


def stubs():
    """The text of exercises/dpo.py: the signatures and docstrings of the graded functions."""
    parts = []
    for name, module in FUNCTIONS.items():
        stub = f"{signature_and_docstring(getattr(module, name))}\n    raise NotImplementedError\n"
        parts.append(f"{HEADINGS[name]}\n\n{stub}" if name in HEADINGS else stub)
    return STUBS + "\n" + "\n\n".join(parts)


def signature_and_docstring(function):
    """The first lines of a function's source, up to the end of its docstring."""
    source = inspect.getsource(function)
    docstring = ast.parse(source).body[0].body[0]
    return "\n".join(source.splitlines()[:docstring.end_lineno])


# ---- A file, in a process of its own

def grade_file(path, only=FUNCTIONS, options=(), seconds=10, gigabytes=4, longest=math.inf,
               progress=None):
    """The verdicts on the functions of a file, as exercises/judge.py gives them, and remarks on it.

    Returns ({name: verdict}, remarks). If the process ends before its time, the function that was
    judged is given up, and the others are judged in a new process. seconds: for one proof, longest:
    for the file. gigabytes: of memory, on Linux. options: more options of pytest. progress: called
    with each event of the judge.
    """
    path = Path(path).resolve()
    progress = progress or (lambda event: None)
    verdicts, remarks, left, end = {}, [], list(only), time.monotonic() + longest

    def take(verdict):
        verdicts[verdict["function"]] = verdict
        left.remove(verdict["function"])
        progress({"verdict": verdict})

    with tempfile.TemporaryDirectory() as folder:
        job = {"path": str(path), "seconds": seconds, "gigabytes": gigabytes,
               "options": list(options), "dump": str(Path(folder) / "stopped")}
        while left:
            begun = loaded = broken = status = None
            for event in events(job | {"only": left, "verdicts": verdicts}, folder,
                                longest=2 * seconds + 20):
                broken = event.get("broken")
                if broken and begun is None:
                    raise RuntimeError(f"the proofs could not be run:\n{broken}")
                if time.monotonic() > end:
                    remarks.append(f"after {longest:g} s the rest was not judged")
                    return verdicts, remarks
                if broken:
                    break
                if "loaded" in event:
                    remarks, loaded = event["remarks"], event["loaded"]
                begun = event.get("begin", begun)
                status = event.get("status")
                if "verdict" in event:
                    take(event["verdict"])
                    begun = None
                else:
                    progress(event)
                if "end" in event or loaded == []:
                    return verdicts, remarks
            remark, where = why_it_ended(Path(job["dump"]), path, seconds, status)
            if broken:
                remark = f"it breaks the grader: {broken.strip().splitlines()[-1]}"
            if begun is None:
                remarks.append(f"{where or 'the import of the file'}: {remark}")
                break
            take(new_verdict(begun) | {"verdict": "wrong", "remark": remark, "where": where})
    return verdicts, remarks


def events(job, folder, longest):
    """The events of one process of the judge, until it ends, or until it says nothing for
    `longest` seconds; then it is ended."""
    word = secrets.token_hex()  # stands before each event: nobody else can make one up
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (open(Path(folder) / "errors", "w+", encoding="utf-8", errors="replace") as errors,
          subprocess.Popen([sys.executable, "-B", "-m", "exercises.judge"], cwd=folder,
                           env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                           encoding="utf-8", errors="replace") as process):
        lines, started = queue.Queue(), False
        threading.Thread(target=read, args=(process.stdout, lines), daemon=True).start()
        try:
            process.stdin.write(json.dumps(job | {"word": word}) + "\n")
            process.stdin.flush()
            while (line := lines.get(timeout=longest)) is not None:
                if line.startswith(word):
                    started = True
                    yield json.loads(line.removeprefix(word))
        except (queue.Empty, OSError):
            pass
        finally:
            process.kill()
        if not started:
            errors.seek(0)
            yield {"broken": errors.read()}
        yield {"status": process.wait()}


def read(stream, lines):
    """Put the lines of a stream into a queue, and None at its end."""
    with contextlib.suppress(ValueError):  # the stream was closed
        for line in stream:
            lines.put(line)
    lines.put(None)


def why_it_ended(dump, path, seconds, status):
    """(remark, where): from the traceback that Python leaves when it is ended for its time."""
    text = dump.read_text(encoding="utf-8", errors="replace") if dump.exists() else ""
    dump.unlink(missing_ok=True)
    if not text:
        return f"it ends Python (exit status {status}), or uses too much memory", ""
    name = str(path).encode("ascii", "backslashreplace").decode()
    found = re.search(rf'File "{re.escape(name)}", line (\d+)', text)
    number = int(found[1]) if found else 0
    where = f"line {number}: {linecache.getline(str(path), number).strip()}" if found else ""
    return f"it does not return within {seconds:g} s", where


# ---- What is printed: at most 24 lines of 80 columns

WIDTH = 80


def row(verdict):
    """One line on a function."""
    return short(f"{verdict['function']:<19} {told(verdict)}")


def told(verdict):
    """The verdict on a function, in words."""
    if verdict["verdict"] == "wrong":
        return f"wrong: {re.split(r'(?<=[.;?]) ', verdict['remark'])[0].rstrip('.;')}"
    parts, guards = [verdict["verdict"]], verdict["guards"]
    if verdict["verdict"] == "waits":
        parts = [f"waits for {verdict['waits_for']}"]
    if guards:
        parts.append(f"{len(guards)} guard{'s' * (len(guards) > 1)} missing ({', '.join(guards)})")
    if verdict["cost"]:
        parts.append(verdict["cost"])
    if verdict["prints"]:
        parts.append(f"it prints ({verdict['prints']})")
    return "; ".join(parts)


def short(line):
    """The line, cut to the width of the screen."""
    return line if len(line) <= WIDTH else line[:WIDTH - 4].rsplit(" ", 1)[0] + " ..."


def advice(verdicts, remarks=()):
    """Lines: where to begin, which is the first function that is not as it should be."""
    lines = [short(remark) for remark in remarks[:2]]
    for verdict in verdicts.values():
        if verdict["verdict"] == "wrong" or verdict["guards"]:
            break
    else:
        return lines
    where = f" Your {verdict['where']}" if verdict["where"] else ""
    lines.append(short(f"Begin with {verdict['function']}.{where}"))
    text = verdict["remark"] or (
        f"Its numbers are right. These guards are missing: {', '.join(verdict['guards'])}.")
    lines += textwrap.wrap(text, WIDTH, max_lines=6 - len(lines), placeholder=" ...")
    return lines


def details(verdict):
    """Lines: every proof of a function, and what failed, for -v."""
    lines = []
    for test, kind, _, outcome, message in verdict["proofs"]:
        lines.append(f"    {outcome:<7} {test}" + f" ({kind})" * (kind != "right"))
        if outcome == "fails":
            lines += textwrap.wrap(message, 100, initial_indent=" " * 12,
                                   subsequent_indent=" " * 12)
    return lines


def complete(verdicts):
    """Whether every function is right and refuses what it must."""
    return all(v["verdict"] == "right" and not v["guards"] for v in verdicts.values())


# ---- The two ways to ask

def command(path, options=(), verbose=False):
    """python -m pytest --impl FILE: prints the verdicts as they come. Returns an exit code."""
    path = Path(path)
    if not path.is_file():
        raise pytest.UsageError(f"--impl {path}: there is no such file. "
                                "python -m exercises.grading > mine.py writes the stubs")
    print(f"{path.name}, function by function")
    with tqdm(total=len(FUNCTIONS), unit="function", leave=False, disable=None) as bar:
        def progress(event):
            if "begin" in event:
                bar.set_description(event["begin"])
            if "verdict" in event:
                bar.update()
                lines = [row(event["verdict"])] + details(event["verdict"]) * verbose
                bar.write("\n".join(lines))
                sys.stdout.flush()
        verdicts, remarks = grade_file(path, options=options, progress=progress)
    if not verdicts:
        raise pytest.UsageError(f"--impl {path} cannot be graded. " + ". ".join(
            [*remarks, f"It defines none of {', '.join(FUNCTIONS)}"]))
    if verbose:
        print("\n".join(["", *map(row, verdicts.values())]))
    last = advice(verdicts, remarks)
    if last:
        print("\n".join(["", *last]))
    return pytest.ExitCode.OK if complete(verdicts) else pytest.ExitCode.TESTS_FAILED


def grade(**functions):
    """In a notebook: grade functions where they are, as in grade(dpo_loss=my_function).

    Prints a line for each function. Returns True if every one is right and refuses what it must.
    """
    unknown = [name for name in functions if name not in FUNCTIONS]
    if unknown or not functions:
        raise TypeError(f"grade({', '.join(unknown)}): name one or more of "
                        f"{', '.join(FUNCTIONS)}, as in grade(dpo_loss=my_function)")
    judge = Judge(functions, [name for name in FUNCTIONS if name in functions])
    run(judge)
    print("\n".join([*map(row, judge.verdicts.values()), *advice(judge.verdicts)]))
    return complete(judge.verdicts)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prints the empty functions, to begin anew.")
    parser.parse_args(argv)
    print(stubs(), end="")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()
