"""Do the proofs see every mistake? A mutant is a file with one small mistake in it.

    python tests/mutants.py world.py ppo.py   the mutants of these files
    python tests/mutants.py --changed         of the files that differ from the last commit
    python tests/mutants.py all               of all files below: more than an hour

A mutant is killed if a proof fails. One that lives is a mistake that no proof sees: write a proof.
If it does what the file does, no proof can see it. Then enter it in tests/equivalent.toml, with the
reason. Every mutant runs in a process of its own, on a copy of the project.
"""
import argparse
import ast
import concurrent.futures
import copy
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path
from typing import Callable, NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
# The proofs that are run on a file's mutants, in this order, until the first of them fails.
TESTS = {
    "dpo.py": ("7_code", "2_loss_and_gradient", "4_variants"),
    "losses.py": ("4_variants", "2_loss_and_gradient", "3_token_level"),
    "ppo.py": ("steps", "5_reinforcement_learning"),
    "model.py": ("model", "7_code"),
    "world.py": ("world",),
    "data.py": ("data",),
    "evaluate.py": ("evaluate",),
    "train.py": ("main", "steps"),
    "rlhf.py": ("steps", "rlhf"),
    "lab/tabular.py": ("6_baselines", "1_optimum", "5_reinforcement_learning", "3_token_level",
                       "4_variants", "2_loss_and_gradient"),
    "lab/more_losses.py": ("more_losses",),
    "support/trie.py": ("trie", "world"),
    "support/run.py": ("run",),
    "support/files.py": ("checkpoints",),
    "support/command.py": ("command", "run"),
    "support/checkpoints.py": ("checkpoints",),
    "support/flags.py": ("flags",),
    "support/machine.py": ("flags",),
    "support/preferences.py": ("data", "hugging_face"),
    "support/own_data.py": ("own_data",),
    "support/gpt2.py": ("gpt2",),
    "lab/credit.py": ("credit",),
    "lab/export.py": ("export",),
}


class Mutant(NamedTuple):
    file: str
    function: str  # its qualified name; empty outside of functions
    old: str  # the statement, or the expression of a compound statement, without the mistake
    new: str  # and with it
    line: int
    source: Callable  # source() is the whole file with the mistake

    @property
    def name(self):
        return self[:4]


# ---- Which mistakes

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
             ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.MatMult: ast.Mult,
             ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}
COMPARISONS = {ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
               ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
               ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
               ast.NotIn: (ast.In,)}
CALLS = {"min": "max", "max": "min", "mean": "sum", "sum": "mean", "any": "all", "all": "any",
         "minimum": "maximum", "maximum": "minimum", "argmax": "argmin"}
STATEMENTS = ast.Expr | ast.Raise | ast.AugAssign | ast.For | ast.Break | ast.Continue


def mistakes(node, bound):
    """What may stand in the place of a node: another operator, comparison, constant, function,
    condition or result, or `pass`. bound: the names that have a value before this node."""
    def other(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield other(op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for new in COMPARISONS[type(op)]:
                yield other(ops=[*node.ops[:i], new(), *node.ops[i + 1:]])
    if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd) and not is_index(node):
        yield node.operand
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield other(value=not node.value)
        elif isinstance(node.value, int):
            yield other(value=node.value + 1)
            if node.value == 1:
                yield other(value=0)
        elif isinstance(node.value, float):
            yield other(value=2 * node.value or 1.0)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield other(func=ast.Name(CALLS[node.func.id]))
        if isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
            yield other(func=ast.Attribute(node.func.value, CALLS[node.func.attr]))
    if isinstance(node, ast.If | ast.IfExp):
        yield other(test=ast.Constant(True))
        yield other(test=ast.Constant(False))
    if isinstance(node, ast.While):
        yield other(test=ast.Constant(False))
    if isinstance(node, ast.Return) and node.value is not None:
        yield other(value=ast.Constant(None))
    if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
        yield other(elts=[node.elts[1], node.elts[0], *node.elts[2:]])
    if isinstance(node, STATEMENTS):
        yield ast.Pass()
    if isinstance(node, ast.Assign) and stored(*node.targets) <= bound:
        yield ast.Pass()  # a name that has no value yet would fail at its next use


def is_index(node):
    """-1, -2, ...: an axis, or a place from behind. Of two axes, -1 and 1 are the same."""
    return isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) and isinstance(
        node.operand.value, int)


def stored(*nodes):
    """The names that get a value inside these nodes."""
    found = set()
    for node in nodes:
        for n in ast.walk(node):
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                found.add(n.id)
            if isinstance(n, ast.arg):
                found.add(n.arg)
    return found


def is_ignored(node):
    """Texts, messages, imports, and what runs only if the file is started as a program."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return True
    return not isinstance(node, ast.AST) or isinstance(
        node, ast.JoinedStr | ast.Import | ast.ImportFrom)


def mutants(file, source=None):
    """All mutants of a file, a list. source: its text, by default what the file holds."""
    if source is None:
        source = (ROOT / file).read_text(encoding="utf-8")
    tree, found = ast.parse(source), {}

    def visit(parent, function, unit, bound):
        for field, value in ast.iter_fields(parent):
            if field in ("decorator_list", "annotation", "returns"):
                continue
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if is_ignored(node):
                    continue
                is_new_unit = unit is None or isinstance(node, ast.stmt) or hasattr(parent, "body")
                shown, inner, known = node if is_new_unit else unit, function, bound
                for new in mistakes(node, bound):
                    add((parent, field, i), node, new, shown, function)
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    inner, known = [*function, node.name], set()
                visit(node, inner, shown, known)
                bound |= stored(node)

    def add(place, node, new, shown, function):
        def source():
            put(*place, new)
            changed = ast.unparse(ast.fix_missing_locations(tree))
            put(*place, node)
            return changed

        old_text = first_line(shown)
        put(*place, new)
        new_text = first_line(new if shown is node else shown)
        put(*place, node)
        if old_text != new_text:
            mutant = Mutant(file, ".".join(function), old_text, new_text, node.lineno, source)
            found[mutant.name] = mutant

    visit(tree, [], None, set())
    return list(found.values())


def put(parent, field, i, node):
    if isinstance(getattr(parent, field), list):
        getattr(parent, field)[i] = node
    else:
        setattr(parent, field, node)


def first_line(node):
    return ast.unparse(node).split("\n")[0] if isinstance(node, ast.stmt) else ast.unparse(node)


def equivalents():
    """{mutant's name: why no proof can see it}, from tests/equivalent.toml."""
    text = (ROOT / "tests" / "equivalent.toml").read_text(encoding="utf-8")
    found = {}
    for why in tomllib.loads(text)["reason"]:
        for function, old, new in why["mutants"]:
            found[why["file"], function, old, new] = why["why"]
    return found


# ---- Which of them live

def run_proofs(tree, tests, seconds):
    """In a new process: run the proofs on the copy of the project in the folder `tree`. The exit
    status is pytest's. Two files keep which proof failed, and the processor's seconds."""
    os.chdir(tree)
    # the copy is meant, not the project
    sys.path[:] = [str(tree), *(p for p in sys.path if ROOT not in Path(p).resolve().parents)]
    if seconds:
        sys.dont_write_bytecode = True  # the next mutant must not find this one's
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        if sys.platform != "win32":  # a mutant may never end
            import resource
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    import pytest
    import torch
    torch.set_num_threads(1)

    class Failure:
        def pytest_runtest_logreport(self, report):
            if report.failed:
                Path("failure").write_text(report.nodeid, encoding="utf-8")

    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[Failure()])
    Path("seconds").write_text(str(time.process_time()), encoding="utf-8")
    raise SystemExit(int(status))


class Worker:
    """A copy of the project, in which one mutant after the other is tried."""

    def __init__(self, source, tree, context):
        self.tree, self.context = tree, context
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns("out", ".*"))

    def try_source(self, file, source, seconds=None):
        """With this text in the place of a file: the proof that fails, or None if all hold."""
        path, failure = self.tree / file, self.tree / "failure"
        failure.unlink(missing_ok=True)
        path.write_text(source, encoding="utf-8")
        for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
            stale.unlink()
        tests = [f"tests/test_{name}.py" for name in TESTS[file]]
        process = self.context.Process(target=run_proofs, args=(self.tree, tests, seconds))
        process.start()
        process.join(seconds and 10 * seconds)
        if process.is_alive():
            process.kill()
            process.join()
        shutil.copyfile(ROOT / file, path)
        if process.exitcode == 0:
            return None
        return failure.read_text(encoding="utf-8") if failure.exists() else "it cannot be run"


def try_all(files, folder):
    """Yields (mutant, the proof that kills it or None), after a first look at the files as they
    are. Raises SystemExit where a proof fails then."""
    windows = sys.platform == "win32"
    context = multiprocessing.get_context("spawn" if windows else "forkserver")
    if not windows:  # the libraries are imported once, and not for every mutant
        context.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "hypothesis",
                                        "matplotlib.pyplot", "tiktoken", "tqdm"])
    first, seconds = Worker(ROOT, folder / "0", context), {}
    for file in files:
        source = (ROOT / file).read_text(encoding="utf-8")
        proof = first.try_source(file, ast.unparse(ast.parse(source)))
        if proof:
            raise SystemExit(f"Without any mutant, a proof fails: {proof}")
        # several times what the proofs take, and what a process takes to begin
        seconds[file] = round(5 + 3 * float((first.tree / "seconds").read_text("utf-8")))
    workers = queue.SimpleQueue()
    workers.put(first)
    for k in range(1, os.cpu_count()):
        workers.put(Worker(first.tree, folder / str(k), context))

    one_at_a_time = threading.Lock()  # the mutants of a file are made from one syntax tree

    def attempt(mutant):
        worker = workers.get()
        with one_at_a_time:
            source = mutant.source()
        try:
            return worker.try_source(mutant.file, source, seconds[mutant.file])
        finally:
            workers.put(worker)

    jobs = [mutant for file in files for mutant in mutants(file)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        tried = zip(jobs, pool.map(attempt, jobs))
        yield from tqdm(tried, total=len(jobs), unit="mutant", dynamic_ncols=True)


def changed_files():
    """The files of TESTS that differ from the last commit."""
    done = subprocess.run(["git", "diff", "--name-only", "HEAD"], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    return [file for file in done.stdout.split() if file in TESTS]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="all, or of: " + ", ".join(TESTS))
    parser.add_argument("--changed", action="store_true",
                        help="the files that differ from the last commit")
    args = parser.parse_args(argv)
    files = list(TESTS) if "all" in args.files else args.files
    files = list(dict.fromkeys(files + (changed_files() if args.changed else [])))
    if unknown := [file for file in files if file not in TESTS]:
        parser.error(f"no proofs are named for {', '.join(unknown)}, only for " + ", ".join(TESTS))
    if not files:
        parser.error("no file is given, or none of these has changed: " + ", ".join(TESTS))
    explained, wrong = equivalents(), 0
    counts = {file: [0, 0, 0] for file in files}  # mutants, killed, equivalent
    with tempfile.TemporaryDirectory() as folder:
        for mutant, proof in try_all(files, Path(folder)):
            known = mutant.name in explained
            for i, counted in enumerate((True, proof is not None, known)):
                counts[mutant.file][i] += counted
            if known == (proof is None):
                continue
            wrong += 1
            what = f"{proof} sees this, so it is not equivalent" if known else "lives"
            tqdm.write(f"{mutant.file}, line {mutant.line}, {mutant.function}: {what}\n"
                       f"    {mutant.old}\n    {mutant.new}")
    print(f"\n{'':<24}{'mutants':>9}{'killed':>9}{'':>8}{'equivalent':>12}")
    for file, (n, killed, equivalent) in counts.items():
        print(f"{file:<24}{n:>9}{killed:>9}{killed / n:>8.1%}{equivalent:>12}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
