"""Test your own functions with the project's proofs.

    python -m pytest --impl exercises/dpo.py          every function of a file
    from exercises.grading import grade               in a notebook: the functions you have so far
    grade(dpo_loss=my_dpo_loss)
    python -m exercises.grading > mine.py             a new file with the stubs

A stub is a function with a signature and a docstring, and nothing else. A proof is a test that
carries @grades("function"). The proofs are run with your functions in the place of the project's
own. The report names each function. It is done, or not started, or waiting for another function,
or wrong. For a wrong one the report says what was probably done.
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

import dpo
import losses
import model
from exercises.compare import Mistake

ROOT = Path(__file__).resolve().parent.parent
PROOFS = sorted((ROOT / "tests").glob("test_[1-9]_*.py"))  # the files that hold graded proofs

# The graded functions, each with the module that defines it, in the order of the derivation. A
# function uses only functions that stand before it.
FUNCTIONS = {
    "token_logps": dpo, "response_logps": dpo, "sequence_logps": model, "pair_logps": dpo,
    "preference_logits": dpo, "implicit_rewards": dpo, "dpo_loss": dpo,
    "gradient_weight": dpo, "analytic_gradient": dpo, "central_differences": dpo,
    "gradient_check": dpo,
    "cdpo_loss": losses, "robust_loss": losses, "ipo_loss": losses, "hinge_loss": losses,
    "missing_mass": losses,
}

# ---- The stubs

STUBS = '''"""Your own DPO. Each function has a signature, and a docstring says what it must do.

Write one function, and see what the project's proofs say about it:

    python -m pytest --impl exercises/dpo.py

Begin at the top. A function uses only functions that stand before it. The message of a ValueError
names what is wrong, such as "beta=0", or shows the shapes that differ.

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
                 "# returns, and refuses what it refuses.",
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


# ---- Somebody's functions in the place of the project's own

def load(path):
    """The graded functions that a file defines, {name: function}.

    Raises pytest.UsageError, which says what to do, where there are none.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise pytest.UsageError(f"--impl {path}: there is no such file. "
                                "python -m exercises.grading > mine.py writes the stubs")
    spec = importlib.util.spec_from_file_location("implementation", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # in the student's code, such as a syntax error
        line = getattr(error, "lineno", None)  # only a syntax error has one
        if line is None:
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise pytest.UsageError(f"--impl {path} cannot be imported; line {line}: "
                                f"{type(error).__name__}: {error}") from None
    defined = {}
    for name in FUNCTIONS:
        if callable(getattr(module, name, None)):
            defined[name] = getattr(module, name)
    if not defined:
        raise pytest.UsageError(f"--impl {path} defines none of {', '.join(FUNCTIONS)}")
    return defined


@contextlib.contextmanager
def in_place(functions):
    """Inside this context, functions stand in the place of the project's functions of these names.

    functions: {name: function}. The modules hold some functions of one another, because they
    import them: losses holds dpo.dpo_loss, and losses.LOSSES holds it too. Each is replaced
    wherever it is held. So a project's function that calls another one calls the new one.
    """
    new = {}
    for name, function in functions.items():
        own = getattr(FUNCTIONS[name], name)
        new[id(own)] = function
    replaced = []
    for holder in (vars(dpo), vars(model), vars(losses), losses.LOSSES):
        for key, value in holder.items():
            if id(value) in new:
                replaced.append((holder, key, value))
    for holder, key, value in replaced:
        holder[key] = new[id(value)]
    try:
        yield
    finally:
        for holder, key, value in replaced:
            holder[key] = value


def checked(name, function):
    """The function; where it returns None, an error says that a return may be missing."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if result is None:
            raise AssertionError(f"{name} returned None: is a return missing?")
        return result
    return call


def not_there(name):
    """A function that stands for one that is not in the student's file."""
    def call(*args, **kwargs):
        raise NotImplementedError(name)
    return call


# ---- The grader

def graded_by(item):
    """The name of the function that a test grades; None for a test that grades none."""
    marker = item.get_closest_marker("grades")
    return marker.args[0] if marker else None


class Grader:
    """A plugin of pytest. It runs the proofs with the given functions, and reports on each of them.

    functions: {name: function}. only: the names to report on, by default all graded functions.
    """

    only_the_verdict = True  # the project's conftest.py reads this

    def __init__(self, functions, title, only=FUNCTIONS):
        self.functions, self.title, self.only = functions, title, only
        self.named = {}  # name -> (test, message) of the first known mistake
        self.results = {name: [] for name in only}  # name -> [(test, verdict, message)]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        """Keep the proofs of the functions in question. Put them in the order of the derivation,
        and those of one function in the order of the files: a plugin may have shuffled them."""
        order = list(FUNCTIONS)

        def place(item):
            return order.index(graded_by(item)), item.path, item.reportinfo()[1]

        mine = [item for item in items if graded_by(item) in self.only]
        others = [item for item in items if graded_by(item) not in self.only]
        config.hook.pytest_deselected(items=others)
        items[:] = sorted(mine, key=place)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session):
        theirs = {}
        for name in self.only:
            if name in self.functions:
                theirs[name] = checked(name, self.functions[name])
            else:
                theirs[name] = not_there(name)
        with in_place(theirs):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        name = graded_by(item)
        if call.excinfo is None:
            if call.when == "call":
                self.results[name].append((item.name, "holds", ""))
            return report
        error = call.excinfo.value
        if isinstance(error, NotImplementedError):
            missing = missing_function(error)
            report.verdict = "not started"
            if missing not in (name, "<module>"):
                report.verdict = f"waits for {missing}"
            message = report.verdict
        else:
            report.verdict, message = "wrong", self.explain(name, error)
            if isinstance(error, Mistake):
                self.named.setdefault(name, (item.name, message))
        report.longrepr = f"{(item.function.__doc__ or '').strip()}\n\n>>> {message}"
        self.results[name].append((item.name, report.verdict, message))
        return report

    def explain(self, name, error):
        """What went wrong, in the proof's words if it has any, and where in the student's code."""
        # without the values that pytest adds to an assertion
        text = str(error).split("\nassert ")[0].split("\n +")[0].strip()
        if not isinstance(error, AssertionError):
            text = f"{type(error).__name__}: {text}"
        theirs = {inspect.getsourcefile(function) for function in self.functions.values()}
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename in theirs:
                where = f"in your {frame.name}, line {frame.lineno}: {frame.line}"
                return f"{name}: {text}\n    {where}"
        return f"{name}: {text}"

    def pytest_report_teststatus(self, report):
        verdict = getattr(report, "verdict", None)
        if verdict and verdict != "wrong":  # such a test is counted, and not shown as a failure
            return "not started", "-", verdict.upper()

    def summary(self):
        """Text: a line for each function, and for a wrong one what to look at first."""
        lines, wrong = [], 0
        for name in self.only:
            verdicts = [verdict for _, verdict, _ in self.results[name]]
            verdict = overall(verdicts)
            held = verdicts.count("holds")
            lines.append(f"{name:<20}{verdict:<14}{held:>3} of {len(verdicts)} proofs hold")
            if verdict == "wrong":
                wrong += 1
                test, message = self.first_wrong(name)
                lines += ["    " + line for line in message.splitlines()] + [f"    ({test})"]
        if wrong > 1:
            lines.append("Begin with the first function that is wrong. A function that calls it "
                         "may be right and only get wrong values from it.")
        return "\n".join(lines)

    def first_wrong(self, name):
        """(test, message): the first known mistake of a function, or else its first failure."""
        if name in self.named:
            return self.named[name]
        failures = [(test, m) for test, verdict, m in self.results[name] if verdict == "wrong"]
        return failures[0]

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"{self.title}, function by function")
        terminalreporter.write_line(self.summary())


def missing_function(error):
    """The name of the function that raised NotImplementedError."""
    if error.args:
        return error.args[0]
    return traceback.extract_tb(error.__traceback__)[-1].name


def overall(verdicts):
    """One verdict on a function from the verdicts of its proofs."""
    if not verdicts:
        return "not run"
    if "wrong" in verdicts:
        return "wrong"
    return next((verdict for verdict in verdicts if verdict != "holds"), "done")


# ---- In a notebook

def grade(**functions):
    """Grade functions where they are: grade(dpo_loss=my_function).

    Prints a line for each function. Returns True if every proof holds.
    """
    unknown = [name for name in functions if name not in FUNCTIONS]
    if unknown or not functions:
        raise TypeError(f"grade({', '.join(unknown)}): name one or more of "
                        f"{', '.join(FUNCTIONS)}, as in grade(dpo_loss=my_function)")
    grader = Grader(functions, "yours", only=[name for name in FUNCTIONS if name in functions])
    # Nothing is captured by pytest. It would take the file descriptors that a notebook's kernel
    # listens to, and the notebook would hang.
    options = [f"--rootdir={ROOT}", "-q", "--capture=no", "-p", "no:cacheprovider", "-W", "ignore"]
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        code = pytest.main([*map(str, PROOFS), *options], plugins=[grader])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the proofs could not be run:\n{quiet.getvalue()}")
    print(grader.summary())
    return code == pytest.ExitCode.OK


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    print(stubs(), end="")
