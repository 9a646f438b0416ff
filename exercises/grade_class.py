"""Grade a class: a file or a folder for each student.

    python -m exercises.grade_class FOLDER --out grades.csv

FOLDER holds anna.py, or anna/dpo.py, and so on. Each file is graded as `python -m pytest --impl`
does it, in processes of its own. Written are the table, and beside it a folder of the same name
with a report for each student. Nothing is overwritten. The points stand in exercises/points.toml.

A submission that hangs, ends Python, fails or prints stops nobody else. But this is no sandbox: if
you do not trust the authors, run the command in a container.
"""
import argparse
import concurrent.futures
import csv
import json
import os
import re
import sys
import tomllib
from pathlib import Path

from tqdm import tqdm

from exercises.grading import FUNCTIONS, ROOT, grade_file, new_verdict, short, told
from support.flags import number

IGNORED = {"__MACOSX", "__pycache__"}  # and what begins with a point


# ---- Which files, and which points

def submissions(folder):
    """{student: the file, or a sentence that says why there is none}, and the names left out."""
    found, left_out = {}, []
    for path in sorted(folder.iterdir()):
        if path.name in IGNORED or path.name.startswith("."):
            continue
        if path.is_dir():
            student, file = path.name, file_in(path)
        elif path.suffix == ".py":
            student, file = path.stem, path
        else:
            left_out.append(path.name)
            continue
        # anna.py beside anna/: both are graded
        found[path.name if student in found else student] = file
    return found, left_out


def file_in(folder):
    """dpo.py, or the only Python file of a folder, or the only one that defines what is graded."""
    files = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not any(part in IGNORED or part.startswith(".") for part in parts):
            files.append(path)
    named = [path for path in files if path.name == "dpo.py"]
    defining = [path for path in files if defines_something(path)]
    for candidates in (named, files, defining):
        if len(candidates) == 1:
            return candidates[0]
    if not files:
        return "the folder holds no Python file"
    names = ", ".join(path.relative_to(folder).as_posix() for path in files)
    return f"the folder holds several Python files, and none of them alone is dpo.py: {names}"


def defines_something(path):
    text = path.read_text(encoding="utf-8", errors="replace")
    return any(re.search(rf"^def {name}\b", text, re.MULTILINE) for name in FUNCTIONS)


def read_points(path):
    """{function: points} and {"right", "guards", "cost": share} from a TOML file."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SystemExit(f"--points {path}: {error}") from None
    shares = {"right", "guards", "cost"}
    for section, names in (("share", shares), ("points", FUNCTIONS.keys())):
        for name, value in table.get(section, {}).items():
            if name not in names:
                raise SystemExit(f"--points {path}: [{section}] has no {name}; it has "
                                 f"{', '.join(sorted(names))}")
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise SystemExit(f"--points {path}: {name} = {value!r} must be a number, 0 or more")
    if table.get("share", {}).keys() != shares or abs(sum(table["share"].values()) - 1) > 1e-9:
        raise SystemExit(f"--points {path}: [share] must give right, guards and cost, which add up "
                         "to 1")
    if not table.get("points"):
        raise SystemExit(f"--points {path}: [points] must give the points of the functions")
    return table["points"], table["share"]


def points_of(verdict, points, share):
    """What a function has earned. One that only waits for another one is right itself."""
    if verdict["verdict"] not in ("right", "waits"):
        return 0.0
    there, missing = len(verdict["refuses"]), len(verdict["guards"])
    guards = there / (there + missing) if missing else 1.0
    cost = 0.0 if verdict["cost"] else 1.0
    worth = share["right"] + share["guards"] * guards + share["cost"] * cost
    return points.get(verdict["function"], 0) * worth


# ---- One student

def grade_student(student, file, points, share, options):
    """A dict: student, remarks, verdicts of all functions, earned {function: points}."""
    verdicts, remarks = {}, [file]
    if isinstance(file, Path):
        verdicts, remarks = grade_file(file, **options)
    all_verdicts = {}
    for name in FUNCTIONS:
        missing = new_verdict(name) | {"verdict": "not started"}
        all_verdicts[name] = verdicts.get(name, missing)
    earned = {name: points_of(v, points, share) for name, v in all_verdicts.items()}
    return {"student": student, "remarks": remarks, "verdicts": all_verdicts, "earned": earned}


def report(result, points):
    """What a student gets back, in Markdown."""
    total, most = sum(result["earned"].values()), sum(points.values())
    lines = [f"# {result['student']}: {total:.4g} of {most:g} points", "",
             *[f"- {plain(remark)}" for remark in result["remarks"]], "",
             "| function | points | verdict |", "|---|---|---|"]
    for name, verdict in result["verdicts"].items():
        earned, most = result["earned"][name], points.get(name, 0)
        lines.append(f"| `{name}` | {earned:.4g} of {most:g} | {plain(told(verdict))} |")
    for name, verdict in result["verdicts"].items():
        if verdict["verdict"] == "wrong":
            lines += ["", f"## {name}", "", plain(verdict["remark"]), ""]
            if verdict["where"]:
                lines += ["    " + verdict["where"], ""]
            if verdict["proof"]:
                lines.append(f"The proof that sees it: `tests/{verdict['proof']}`")
    return "\n".join(lines) + "\n"


def plain(text):
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


def for_gradescope(result, points):
    """The results.json of Gradescope,
    https://gradescope-autograders.readthedocs.io/en/latest/specs/."""
    tests = []
    for name, verdict in result["verdicts"].items():
        if points.get(name):
            output = told(verdict)
            if verdict["verdict"] == "wrong":
                output = "\n".join(filter(None, [verdict["remark"], verdict["where"]]))
            right = verdict["verdict"] in ("right", "waits") and not verdict["guards"]
            tests.append({"name": name, "score": result["earned"][name], "max_score": points[name],
                          "status": "passed" if right else "failed", "output": output})
    return {"output": "\n".join(result["remarks"]), "output_format": "text", "tests": tests}


# ---- The class

def summary(result):
    """One line of the table on the screen."""
    verdicts = result["verdicts"].values()
    right = sum(v["verdict"] in ("right", "waits") for v in verdicts)
    missing = sum(len(v["guards"]) for v in verdicts)
    first = next((f"{v['function']}: {told(v).removeprefix('wrong: ')}" for v in verdicts
                  if v["verdict"] == "wrong"), "")
    earned = sum(result["earned"].values())
    return short(f"{result['student'][:16]:<16} {earned:>6.4g} {right:>5} {missing:>6}    "
                 f"{first or '. '.join(result['remarks'])}")


def cell(text):
    """A cell that a spreadsheet does not take for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def grade_class(args):
    points, share = read_points(args.points)
    if not args.folder.is_dir():
        raise SystemExit(f"{args.folder}: there is no such folder. It holds a file or a folder for "
                         "each student")
    found, left_out = submissions(args.folder)
    if not found:
        raise SystemExit(f"{args.folder} holds no Python file and no folder")
    reports = args.out.with_suffix("")
    if reports == args.out:
        raise SystemExit(f"--out {args.out}: name a file such as grades.csv")
    for path in (args.out, reports):
        if path.exists():
            raise SystemExit(f"{path} exists and is left as it is; choose another --out")
    options = {"seconds": args.seconds, "gigabytes": args.gigabytes, "longest": args.longest,
               "options": ["--seed", str(args.seed)]}
    most = sum(points.values())
    if left_out:
        print(f"Left out, because they are no Python files: {', '.join(left_out)}")
    print(f"{'student':<16} {f'of {most:g}':>6} right no guard  the first mistake, or a remark")

    try:
        reports.mkdir(parents=True)
        table = open(args.out, "x", encoding="utf-8", newline="")
    except OSError as error:
        raise SystemExit(f"--out {args.out}: {error}") from None
    with (table, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
          tqdm(total=len(found), unit="student", leave=False, disable=None) as bar):
        writer = csv.writer(table)
        writer.writerow(["student", "points", "remarks", *FUNCTIONS])
        jobs = [pool.submit(grade_student, student, file, points, share, options)
                for student, file in found.items()]
        try:
            for job in jobs:
                result = job.result()
                write(result, writer, reports, points, args.gradescope)
                table.flush()
                bar.write(summary(result))
                bar.update()
        except BaseException:  # Ctrl-C: what is graded stays written
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(f"Wrote {args.out}, and a report for each student in {reports}{os.sep}.")


def write(result, writer, reports, points, gradescope):
    verdicts = result["verdicts"].values()
    cells = [result["student"], f"{sum(result['earned'].values()):.4g}",
             ". ".join(result["remarks"]), *map(told, verdicts)]
    writer.writerow(map(cell, cells))
    (reports / f"{result['student']}.md").write_text(report(result, points), encoding="utf-8")
    if gradescope:
        text = json.dumps(for_gradescope(result, points), indent=2)
        (reports / f"{result['student']}.json").write_text(text, encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a file or a folder for each student")
    parser.add_argument("--out", type=Path, required=True, help="the table to write, a CSV file")
    parser.add_argument("--points", type=Path, default=ROOT / "exercises" / "points.toml",
                        help="the points of each function (default: exercises/points.toml)")
    parser.add_argument("--gradescope", action="store_true",
                        help="also write Gradescope's results.json for each student")
    parser.add_argument("--jobs", type=number(int, 1, 1000), default=os.cpu_count(),
                        help="how many at once")
    parser.add_argument("--seconds", type=number(float, 0.1, 86_400), default=10,
                        help="for one proof (default: 10)")
    parser.add_argument("--longest", type=number(float, 0.1, 86_400), default=120,
                        help="seconds for one student; a longer one keeps what is judged by then "
                             "(default: 120)")
    parser.add_argument("--gigabytes", type=number(float, 0.5, 1_000_000), default=4,
                        help="of memory for one student, on Linux (default: 4)")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0,
                        help="the seed of the proofs (default: 0)")
    args = parser.parse_args(argv)
    grade_class(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    main()
