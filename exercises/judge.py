"""The judge: runs the project's proofs on somebody's functions.

exercises/grading.py starts it, in a process of its own for a file (python -m exercises.judge), and
in the same process for a notebook. It gives a verdict on each function, a dict:

    function   its name
    verdict    "right", "wrong", "not started", or "waits" for another function
    waits_for  the name of that function
    remark     what was probably done wrong
    where      the place in the student's file, as "line 12: the code"
    proof      the proof that saw it
    guards     the guards that are missing: what a function must refuse, and does not
    refuses    the guards that are there
    cost       what a right function does more often than needed
    prints     the line that prints something
    proofs     [test, kind, label, outcome, message] of each proof that was run

A function that is wrong is replaced by the project's own one while later functions are judged. So
one mistake is counted once. A function that is right only with such a replacement waits for it.

What keeps a function from doing harm stands in exercises/guard.py.
"""
import contextlib
import functools
import importlib.util
import inspect
import io
import json
import os
import sys
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis.errors import Flaky

import dpo
import losses
import model
from exercises.compare import Mistake
from exercises.guard import (
    Failure,
    Listener,
    TimeLimit,
    Untouched,
    forbid,
    limit_memory,
    state_kept,
)

ROOT = Path(__file__).resolve().parent.parent

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
# the files that hold graded proofs
PROOFS = [ROOT / "tests" / f"test_{name}.py"
          for name in ("2_loss_and_gradient", "3_token_level", "4_variants", "7_code")]

OWN = {name: getattr(module, name) for name, module in FUNCTIONS.items()}
HELD_IN = [vars(dpo), vars(model), vars(losses), losses.LOSSES]  # where these functions are held
# How many results a function has, and what they are. All other functions have one.
RESULTS = dict.fromkeys([name for name in OWN if name.endswith("_loss")],
                        "losses, chosen_rewards, rejected_rewards")
RESULTS |= {"implicit_rewards": "chosen_rewards, rejected_rewards",
            "pair_logps": "chosen log-probabilities, rejected log-probabilities"}
MAY_CHANGE = {"central_differences", "gradient_check"}  # these move what they are given, and back


# ---- Somebody's functions in the place of the project's own

@contextlib.contextmanager
def exchanged(new, holders=()):
    """Inside this context, functions stand in the place of others.

    new: {id of a function: the function in its place}. The project's modules hold some functions
    of one another, because they import them: losses holds dpo.dpo_loss, and losses.LOSSES holds it
    too. Each is replaced wherever it is held. holders: more dicts to look in, such as the globals
    of a student's file.
    """
    places = []
    for holder in [*HELD_IN, *holders]:
        for key, value in list(holder.items()):
            if id(value) in new:
                places.append((holder, key, value))
    for holder, key, value in places:
        holder[key] = new[id(value)]
    try:
        yield
    finally:
        for holder, key, value in places:
            holder[key] = value


def not_there(name):
    """A function that stands for the project's own one while a student's file is imported."""
    def call(*args, **kwargs):
        raise NotImplementedError(name)
    return call


def load(path):
    """The graded functions that a file defines, {name: function}, and remarks on the file.

    What the file defines before it fails counts. While it is imported, the project's own functions
    are not there: a file that imports them has not written them.
    """
    spec = importlib.util.spec_from_file_location("implementation", path)
    module = importlib.util.module_from_spec(spec)
    stand_ins = {name: not_there(name) for name in OWN}
    remarks = []
    sys.path.append(str(Path(path).parent))  # for the other files of a student's folder
    with exchanged({id(OWN[name]): stand_ins[name] for name in OWN}), warnings.catch_warnings():
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            remarks.append(failed_import(path, error))
    defined = {}
    for name in OWN:
        function = vars(module).get(name)
        if callable(function) and id(function) not in map(id, stand_ins.values()):
            defined[name] = function
            if type(function) not in (types.FunctionType, functools.partial):
                defined[name] = forwarding(function)
    return defined, remarks, {id(stand_ins[name]): name for name in OWN}


def forwarding(function):
    """A plain function that calls this object. Another object may answer to __globals__ as it
    likes."""
    return lambda *args, **kwargs: function(*args, **kwargs)


def failed_import(path, error):
    """One line on why a file could not be imported to its end."""
    line = getattr(error, "lineno", None)  # only a syntax error has one
    if line is None:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(path)]
        line = lines[-1] if lines else "?"
    if isinstance(error, KeyboardInterrupt):
        return f"line {line}: the import of the file does not come to an end"
    return f"line {line}: {type(error).__name__}: {text_of(error)}".removesuffix(": ")


def text_of(error, longest=300):
    """The message of an error, in one line; its own __str__ may fail."""
    try:
        text = str(error)
    except Exception:
        return "its message cannot be shown"
    # without the values that pytest adds to an assertion
    text = text[:10_000].split("\nassert ")[0].split("\n +")[0]
    text = " ".join(text.split())
    return text if len(text) <= longest else text[:longest] + "..."


def has_text(error):
    """Whether an error has a message of a reasonable length."""
    try:
        return len(str(error)) < 100_000
    except Exception:
        return False


# ---- What a function may return

def plain(result):
    """The result of a function, if it is made of plain tensors and numbers; else Failure.

    A subclass of Tensor, or an object of another kind, could say that it is equal to anything.
    """
    if result is None:
        raise Failure("it returned None: is a return missing?")
    if isinstance(result, Iterator) and type(result).__module__ == "builtins":
        result = list(result)
    if isinstance(result, tuple):  # a NamedTuple is a tuple
        result = tuple(plain(entry) for entry in tuple.__iter__(result))
    elif isinstance(result, list):
        result = [plain(entry) for entry in list.__iter__(result)]
    elif type(result) not in (torch.Tensor, torch.nn.Parameter, float, int, bool, str):
        raise Failure(f"it returned a {type(result).__name__}; wanted a tensor")
    return result


def check_count(name, result):
    """Failure where a function of two or three results returned another number of them."""
    several = isinstance(result, tuple | list)
    if name in RESULTS:
        wanted = RESULTS[name].count(",") + 1
        got = len(result) if several else 1
        if got != wanted:
            raise Failure(f"it returned {got} result{'s' * (got != 1)}; wanted {wanted}: "
                          f"{RESULTS[name]}")
    elif several and name not in ("analytic_gradient", "gradient_check"):
        raise Failure(f"it returned a {type(result).__name__}; wanted one tensor")


def copies(value):
    """The same argument with other tensors, so that nobody changes those of the proof."""
    if type(value) is torch.Tensor:
        return value.clone()
    if type(value) is dict:
        return {key: copies(entry) for key, entry in value.items()}
    return value


def tensors_in(arguments):
    """(name, tensor) of every tensor among the arguments of a call."""
    for name, value in arguments.items():
        if type(value) is torch.Tensor:
            yield name, value
        elif type(value) is dict:
            yield from ((f"{name}[{key!r}]", t) for key, t in tensors_in(value))


# ---- The judge

def new_verdict(name):
    """The verdict on a function before anything is known. The entries are explained above."""
    return {"function": name, "verdict": "right", "waits_for": "", "remark": "", "where": "",
            "proof": "", "guards": [], "refuses": [], "cost": "", "prints": "", "proofs": []}


def graded_by(item):
    """The name of the function that a test grades; None for a test that grades none."""
    marker = item.get_closest_marker("grades")
    return marker.args[0] if marker else None


def kind_of(item):
    """(kind, label): what a graded proof is about. Its label is what a verdict says of it."""
    options = item.get_closest_marker("grades").kwargs
    for kind in ("guard", "cost"):
        if kind in options:
            return kind, options[kind]
    return "right", ""


def does_not_return(seconds, limit):
    if limit < seconds:
        return f"it is too slow: its proofs need more than {2 * seconds:g} s"
    return f"it does not return within {seconds:g} s"


class Judge:
    """A plugin of pytest. It runs the proofs of somebody's functions.

    functions: {name: function}, or a function that returns what `load` returns; it is called when
    all proofs are there. only: the names to judge. verdicts: of functions that were judged before,
    in another process. report: called with each event, a dict.
    seconds: the time of one proof; a function has twice as much for all of them. alone: this
    process serves nothing else. dump: see TimeLimit. path: of the file, for its lines.
    """

    only_the_verdict = True  # the project's conftest.py reads this

    def __init__(self, functions, only=FUNCTIONS, verdicts=(), report=None, seconds=10,
                 alone=False, dump=None, path=None):
        self.source, self.functions, self.only = functions, {}, list(only)
        self.report = report or (lambda event: None)
        self.seconds, self.alone, self.dump = seconds, alone, dump
        self.verdicts, self.verdict, self.stand_ins = dict(verdicts), None, {}
        self.files = {path}
        self.untouched = None
        self.listener = Listener(path)

    # -- which proofs, in which order

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        """Keep the proofs of the functions in question. Put them in the order of the derivation,
        and those of one function in the order of the files: a plugin may have shuffled them."""
        order, kinds = list(FUNCTIONS), ["right", "guard", "cost"]

        def place(item):
            return (order.index(graded_by(item)), kinds.index(kind_of(item)[0]), item.path.name,
                    item.reportinfo()[1])

        mine = [item for item in items if graded_by(item) in self.only]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        # the proofs of the code come before those of what the code means
        items[:] = sorted(mine, key=place)

    def pytest_collection_finish(self, session):
        """All proofs are imported. Now the functions may come."""
        self.sizes = Counter(graded_by(item) for item in session.items)
        if callable(self.source):
            modules = {item.module for item in session.items}
            self.untouched = Untouched([*modules, sys.modules[__name__]], HELD_IN)
            with state_kept(), TimeLimit(self.seconds, self.dump):
                self.functions, remarks, self.stand_ins = self.source()
            changed = self.untouched.changes()
            if changed:
                remarks.append(f"the file changes {', '.join(changed[:3])}; it was put back")
            self.report({"loaded": list(self.functions), "remarks": remarks})
        else:
            self.functions = dict(self.source)
            self.files = set()
            for function in self.functions.values():
                with contextlib.suppress(TypeError):
                    self.files.add(inspect.getsourcefile(function))

    # -- one function

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        name = graded_by(item)
        if self.verdict is None:
            self.begin(name)
        with exchanged(self.new, self.holders):
            done = yield
        if nextitem is None or graded_by(nextitem) != name:
            self.finish()
        return done

    def begin(self, name):
        self.report({"begin": name})
        self.verdict = new_verdict(name)
        self.used, self.given_up, self.named, self.listener.line = [], False, False, None
        self.since = time.monotonic()
        if name not in self.functions:
            self.verdict["verdict"], self.given_up = "not started", True
        # the project's own function -> the student's one, unless that one is known to be wrong or
        # to lack a guard
        self.new, self.holders = {}, []
        for other, function in self.functions.items():
            if other == name:
                self.new[id(OWN[other])] = self.judged(other, function)
            elif self.is_wrong(other) or self.verdicts.get(other, {}).get("guards"):
                self.new[id(function)] = self.replaced(other)
            else:
                self.new[id(OWN[other])] = function
            with contextlib.suppress(AttributeError):
                self.holders.append(inspect.unwrap(function).__globals__)
        for stand_in, other in self.stand_ins.items():
            self.new[stand_in] = self.replaced(other)
        self.holders = list({id(holder): holder for holder in self.holders}.values())
        if self.untouched:
            self.untouched.expect(self.new)

    def is_wrong(self, name):
        return self.verdicts.get(name, {}).get("verdict") in ("wrong", "not started")

    def replaced(self, name):
        """The project's own function. What uses it waits for it, unless only a guard is missing."""
        @functools.wraps(OWN[name])
        def call(*args, **kwargs):
            if name not in self.functions or self.is_wrong(name):
                self.used.append(name)
            return OWN[name](*args, **kwargs)
        return call

    def judged(self, name, function):
        """The student's function, as the proofs call it: with copies, and under observation."""
        signature = inspect.signature(OWN[name])

        @functools.wraps(function)
        def call(*args, **kwargs):
            self.calls += 1
            if name not in MAY_CHANGE:
                args = tuple(map(copies, args))
                kwargs = copies(kwargs)
            given = dict(zip(signature.parameters, args)) | kwargs
            versions = [t._version for _, t in tensors_in(given)]
            with state_kept(refused=True):
                try:
                    result = plain(function(*args, **kwargs))
                except (Exception, KeyboardInterrupt) as error:
                    if not has_text(error):
                        raise Failure(f"it raises {type(error).__name__}, whose message cannot "
                                      "be shown") from error
                    raise
                except BaseException as error:  # sys.exit, pytest.skip
                    text = f"{type(error).__name__}: {text_of(error)}".removesuffix(": ")
                    raise Failure(f"it raises {text}") from error
                finally:
                    changed = self.untouched.changes() if self.untouched else []
                    if changed:
                        raise Failure(f"it changes {', '.join(changed[:3])}")
            check_count(name, result)
            for (argument, tensor), version in zip(tensors_in(given), versions):
                if tensor._version != version and name not in MAY_CHANGE:
                    self.missing_guard(f"it changes {argument}")
            return result
        return call

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        """Run a proof, and take down what came of it. pytest itself sees no failure."""
        if self.given_up:
            return True
        kind, label = kind_of(pyfuncitem)
        fixtures = inspect.signature(pyfuncitem.obj).parameters
        arguments = {a: pyfuncitem.funcargs[a] for a in fixtures}
        test = "::".join(pyfuncitem.nodeid.split("::")[-2:]).removeprefix("tests/")
        self.report({"proof": test})
        left = self.since + 2 * self.seconds - time.monotonic()
        self.calls, limit = 0, TimeLimit(min(self.seconds, max(left, 0.1)), self.dump)
        outcome, message, named, where = "holds", "", False, ""
        with (contextlib.redirect_stdout(self.listener),
              contextlib.redirect_stderr(self.listener)):
            try:
                if self.untouched:
                    self.untouched.changes()  # what was done between the proofs
                with limit, torch.inference_mode(False):
                    pyfuncitem.obj(**arguments)
                if not self.calls:
                    raise Failure("the proof did not call your function")
                if self.untouched and (changed := self.untouched.changes()):
                    raise Failure(f"it changes {', '.join(changed[:3])}")
            except KeyboardInterrupt as error:
                if not limit.fired and not self.alone:
                    raise  # somebody has pressed Ctrl-C
                where, named, outcome = self.place_in_file(error), True, "fails"
                message = "it raises KeyboardInterrupt"
                if limit.fired:
                    message = does_not_return(self.seconds, limit.seconds)
                self.given_up = True
            except BaseException as error:
                outcome, message, named, where = self.explained(error)
        self.take_down(test, kind, label, outcome, message, named, where)
        return True

    def explained(self, error):
        """(outcome, message, whether the mistake has a name, the place in the student's file)"""
        name, where = self.verdict["function"], self.place_in_file(error)
        if isinstance(error, NotImplementedError):
            missing = traceback.extract_tb(error.__traceback__)[-1].name
            if missing in OWN and missing != name:
                return "waits", missing, False, where
            if not self.verdict["proofs"]:
                self.given_up = True
                return "not started", "", False, ""
        if isinstance(error, Flaky):
            return "fails", "it gives different results for the same arguments", True, ""
        message = text_of(error, longest=600)
        if not isinstance(error, AssertionError):
            message = f"{type(error).__name__}: {message}"
            if not where:  # the proof could not use what was returned
                message = f"what it returned cannot be used: {message}"
        return "fails", message, isinstance(error, Mistake | Failure), where

    def place_in_file(self, error):
        """The innermost line of the student's code in a traceback, as "line 12: the code"."""
        while error.__cause__ is not None and not isinstance(error.__cause__, AssertionError):
            error = error.__cause__
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename in self.files:
                return f"line {frame.lineno}: {frame.line}"
        return ""

    def take_down(self, test, kind, label, outcome, message, named, where):
        verdict = self.verdict
        verdict["proofs"].append([test, kind, label, outcome, message])
        if outcome == "not started":
            verdict["verdict"] = "not started"
        elif outcome == "waits":
            self.used.append(message)
        elif outcome == "fails" and kind == "guard":
            self.missing_guard(label)
        elif outcome == "fails" and kind == "cost":
            verdict["cost"] = verdict["cost"] or message
        elif outcome == "fails":
            # the first known mistake, or else the first failure
            if verdict["verdict"] != "wrong" or named and not self.named:
                verdict |= {"verdict": "wrong", "remark": message, "where": where, "proof": test}
                self.named = named

    def missing_guard(self, label):
        if label not in self.verdict["guards"]:
            self.verdict["guards"].append(label)

    def finish(self):
        verdict, name = self.verdict, self.verdict["function"]
        if not self.given_up and len(verdict["proofs"]) < self.sizes[name]:
            verdict |= {"verdict": "wrong",
                        "remark": "not all of its proofs were run. Does the file change pytest?"}
        if verdict["verdict"] == "right" and self.used:
            verdict |= {"verdict": "waits", "waits_for": min(self.used, key=list(OWN).index)}
        labels = {label for _, kind, label, _, _ in verdict["proofs"] if kind == "guard"}
        verdict["refuses"] = sorted(labels - set(verdict["guards"]))
        if self.listener.line is not None:
            verdict["prints"] = f"line {self.listener.line}"
        self.verdicts[name], self.verdict = verdict, None
        self.report({"verdict": verdict})


def run(judge, options=()):
    """Run the proofs. Nothing is captured by pytest: it would take the file descriptors that a
    notebook's kernel listens to, and the notebook would hang."""
    arguments = [f"--rootdir={ROOT}", "-q", "--capture=no", "-p", "no:cacheprovider",
                 "-W", "ignore", *options]
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        code = pytest.main([*map(str, PROOFS), *arguments], plugins=[judge])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"the proofs could not be run:\n{quiet.getvalue()[-3000:]}")


def main():
    """The process of one file. It reads what to do from standard input, and writes its events to
    standard output, a line each, behind a word that the student's code does not know."""
    job = json.loads(sys.stdin.readline())
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    word, path = job["word"], job["path"]

    def report(event):
        out.write(f"{word}{json.dumps(event)}\n")
        out.flush()

    def ends(status=0):
        raise SystemExit(status)

    report({"started": True})
    os._exit = ends
    torch.set_num_threads(1)
    limit_memory(job["gigabytes"])
    forbid(path)
    with open(job["dump"], "w", encoding="utf-8") as dump:
        judge = Judge(lambda: load(path), job["only"], job["verdicts"], report, job["seconds"],
                      alone=True, dump=dump, path=path)
        try:
            run(judge, job["options"])
        except Exception:
            report({"broken": traceback.format_exc()})
    report({"end": True})


if __name__ == "__main__":
    main()
