"""Put the project's proofs to somebody's own functions.

    python -m pytest --impl exercises/dpo.py          every function of a file
    from exercises.grading import grade               and in a notebook, what is written so far:
    grade(dpo_loss=my_dpo_loss)
    python -m exercises.grading > mine.py             a fresh copy of the stubs

The proofs are those tests that carry @grades("function"). They are run with that function in dpo.py's place; what is not there
yet is reported as not started, and what is wrong by what was probably done.
"""
import ast
import contextlib
import functools
import importlib.util
import inspect
import io
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402

FUNCTIONS = [name for name, f in vars(dpo).items() if inspect.isfunction(f) and f.__module__ == "dpo" and name != "main"]

STUBS = '''"""Your dpo.py. Each function has its signature and its contract; what is missing is the function.

Fill in one, and see what the project's proofs say of it:    python -m pytest --impl exercises/dpo.py
The order of the file is a good order. B pairs, T tokens, V vocabulary. Equation numbers: https://arxiv.org/abs/2305.18290v3
"""
import torch
import torch.nn.functional as F
'''


def stubs():
    """The text of exercises/dpo.py: dpo.py's signatures and docstrings, and nothing else."""
    source = Path(dpo.__file__).read_text(encoding="utf-8")
    lines, text = source.splitlines(), STUBS
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            text += "\n\n" + "\n".join(lines[node.lineno - 1:node.body[0].end_lineno]) + "\n    raise NotImplementedError\n"
    return text


def load(path):
    """The functions of a file that have the names of dpo.py's: {name: function}. Raises pytest.UsageError with what to do."""
    path = Path(path).resolve()
    if not path.is_file():
        raise pytest.UsageError(f"--impl {path}: there is no such file. python -m exercises.grading > mine.py writes the stubs")
    spec = importlib.util.spec_from_file_location("implementation", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:                         # a syntax error, an import that fails: the student's to mend
        where = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
        raise pytest.UsageError(f"--impl {path} cannot be imported; line {where}: {type(error).__name__}: {error}") from None
    functions = {name: getattr(module, name) for name in FUNCTIONS if callable(getattr(module, name, None))}
    if not functions:
        raise pytest.UsageError(f"--impl {path} defines none of {', '.join(FUNCTIONS)}")
    return functions


def checked(name, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if result is None:
            raise AssertionError(f"{name} returned None: is a return missing?")
        return result
    return call


def not_there(name):
    def call(*args, **kwargs):
        raise NotImplementedError(name)
    return call


class Grader:
    """A pytest plugin: runs the proofs of the given functions with these in dpo.py's place, and reports function by function.

    functions: {name: function}; only: the names to report on, by default all of dpo.py's."""

    only_the_verdict = True                                            # see conftest.py

    def __init__(self, functions, title, only=FUNCTIONS):
        self.functions, self.title, self.only = functions, title, only
        self.named = {}                                                # name -> (test, message)
        self.results = {name: [] for name in only}                     # name -> [(test, verdict, message)]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        mine = [i for i in items if (mark := i.get_closest_marker("grades")) and mark.args[0] in self.only]
        config.hook.pytest_deselected(items=[i for i in items if i not in mine])
        # the file's order, and within a function the derivation's, whatever a plugin that shuffles has made of it
        items[:] = sorted(mine, key=lambda i: (FUNCTIONS.index(i.get_closest_marker("grades").args[0]), i.path, i.reportinfo()[1]))

    def pytest_runtestloop(self, session):
        self.before = {name: getattr(dpo, name) for name in self.only}
        for name in self.only:
            theirs = self.functions.get(name)
            setattr(dpo, name, checked(name, theirs) if theirs else not_there(name))

    def pytest_sessionfinish(self, session):
        for name, function in getattr(self, "before", {}).items():
            setattr(dpo, name, function)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        name = item.get_closest_marker("grades").args[0]
        if call.excinfo is None:
            if call.when == "call":
                self.results[name].append((item.name, "holds", ""))
            return report
        error = call.excinfo.value
        if isinstance(error, NotImplementedError):
            missing = error.args[0] if error.args else traceback.extract_tb(error.__traceback__)[-1].name
            report.verdict = "not started" if missing in (name, "<module>") else f"waits for {missing}"
            message = report.verdict
        else:
            report.verdict, message = "wrong", self.explain(name, error)
            if type(error).__name__ == "Mistake":              # tests/tools.py knows which mistake it is: say that first
                self.named.setdefault(name, (item.name, message))
        report.longrepr = f"{(item.function.__doc__ or '').strip()}\n\n>>> {message}"
        self.results[name].append((item.name, report.verdict, message))
        return report

    def explain(self, name, error):
        """What went wrong, in the proof's words where it has any, and where in the student's own code."""
        text = str(error).split("\nassert ")[0].split("\n +")[0].strip()      # pytest adds the values it compared
        if not isinstance(error, AssertionError):
            text = f"{type(error).__name__}: {text}"
        theirs = {inspect.getsourcefile(f) for f in self.functions.values()}
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename in theirs:
                return f"{name}: {text}\n    in your {frame.name}, line {frame.lineno}: {frame.line}"
        return f"{name}: {text}"

    def pytest_report_teststatus(self, report):
        verdict = getattr(report, "verdict", None)
        if verdict and verdict != "wrong":                     # its own category: counted, not shown as a failure
            return "not started", "-", verdict.upper()

    def summary(self):
        """A line a function: done, not started, waiting for another one, or wrong, and then what to look at first."""
        lines, wrong = [], 0
        for name in self.only:
            verdicts = [verdict for _, verdict, _ in self.results[name]]
            held = verdicts.count("holds")
            if held == len(verdicts):
                verdict = "done" if verdicts else "not run"
            else:
                verdict = "wrong" if "wrong" in verdicts else next(v for v in verdicts if v != "holds")
            lines.append(f"{name:<20}{verdict:<14}{held:>3} of {len(verdicts)} proofs hold")
            if verdict == "wrong":
                wrong += 1
                test, message = self.named.get(name) or next((t, m) for t, v, m in self.results[name] if v == "wrong")
                lines += ["    " + line for line in message.splitlines()] + [f"    ({test})"]
        if wrong > 1:
            lines.append("Begin with the first that is wrong: what calls it may only inherit the mistake.")
        return "\n".join(lines)

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"{self.title}, function by function")
        terminalreporter.write_line(self.summary())


def grade(**functions):
    """Grade functions where they are, for instance in a notebook: grade(dpo_loss=my_function, ...). Prints a line for each,
    and returns True if every proof holds."""
    unknown = [name for name in functions if name not in FUNCTIONS]
    if unknown or not functions:
        raise TypeError(f"grade({', '.join(unknown) or ''}): name one or more of {', '.join(FUNCTIONS)}, as in "
                        "grade(dpo_loss=my_function)")
    grader = Grader(functions, "yours", only=[name for name in FUNCTIONS if name in functions])
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        # no capture by pytest: it would take the file descriptors that a notebook's kernel listens to, and hang
        code = pytest.main([str(ROOT / "tests"), f"--rootdir={ROOT}", "-q", "--capture=no", "-p", "no:cacheprovider", "-W", "ignore"],
                           plugins=[grader])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the proofs could not be run:\n{quiet.getvalue()}")
    print(grader.summary())
    return code == pytest.ExitCode.OK


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    print(stubs(), end="")
