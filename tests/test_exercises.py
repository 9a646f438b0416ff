"""exercises/: changes of the code are found by syntax. Every bug is seen by the proof named for it.
The graded proofs accept another implementation and name the mistakes of wrong ones. The stubs are
the project's signatures and docstrings."""
import ast
import inspect
import io
import math
import re
import subprocess
import sys
import tokenize
import tomllib

import pytest
import torch

import dpo
import losses
import model
from conftest import ROOT
from exercises import changes, find_the_bug, grading
from exercises.judge import OWN, PROOFS, Judge, exchanged, graded_by, kind_of, load, run

pytestmark = pytest.mark.slow


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


BUGS = find_the_bug.bugs()
ALTERATIONS = tomllib.loads(read("tests/alterations.toml"))["alteration"]
CHANGED_FILES = sorted({change["file"] for change in BUGS + ALTERATIONS})
ANOTHER = "tests/another_dpo.py"


class Outcomes:
    """A plugin for a pytest run within this one: what its tests came to."""
    only_the_verdict = True

    def __init__(self):
        self.reports = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.reports.append(report)


def run_pytest(*args, plugin):
    """A pytest run within this one. It prints nothing and leaves no files."""
    with find_the_bug.quietly():
        pytest.main([f"--rootdir={ROOT}", "-q", "-p", "no:cacheprovider", "-W", "ignore",
                     *map(str, args)], plugins=[plugin])


def run_proof(proof):
    """The outcomes of one test, run here and now, with whatever bug is in effect.

    A test with parameters is run until its first failure.
    """
    outcomes = Outcomes()
    run_pytest(ROOT / "tests" / proof, "-x", plugin=outcomes)
    torch.manual_seed(0)
    return [r.outcome for r in outcomes.reports]


# ---- Changes of the code

def tree(source):
    return ast.dump(ast.parse(source))


def without_format(source):
    """The source as Python writes its syntax tree: no comments, and every statement in one line."""
    return ast.unparse(ast.parse(source))


def spread_out(source):
    """The source with a line break and a comment after every comma that stands in brackets."""
    lines, depth, commas = source.splitlines(keepends=True), 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
            if token.string == "," and depth:
                commas.append(token.end)
    for row, column in reversed(commas):
        line = lines[row - 1]
        lines[row - 1] = f"{line[:column]}  # β\n{line[column:]}"
    return "".join(lines)


@pytest.mark.parametrize("file", CHANGED_FILES)
def test_changes_do_not_depend_on_how_the_code_is_formatted(file):
    """Every bug and every alteration is found in the reformatted file too, and does the same."""
    source = read(file)
    layouts = [without_format(source), spread_out(source)]
    for layout in layouts:
        assert layout != source and tree(layout) == tree(source)
    for change in BUGS + ALTERATIONS:
        if change["file"] == file:
            wanted = tree(changes.changed_source(change))
            for layout in layouts:
                assert tree(changes.changed_source(change, layout)) == wanted


SAMPLE = """
import functools


@functools.lru_cache(maxsize=None)
def cached(n):
    return [i for i in range(n)] + [i for i in range(n)]


class Stepper:
    def step(self, x, *, scale=2):
        # This comment stays.
        name = 'β'; y = x * scale  # y belongs to x
        if y:
            y = y - 1 - x
            print('a', y)  # said once
        return y * (x - 1)


def steps(n):
    for i in range(n):
        yield i
"""


def sample_changed(function, old, new):
    change = {"file": "sample.py", "function": function, "old": old, "new": new}
    return changes.changed_source(change, SAMPLE)


@pytest.mark.parametrize("old, new, line, becomes", [
    ("x * scale", "x + scale",  # behind a letter of two bytes
     "name = 'β'; y = x * scale  # y belongs to x",
     "name = 'β'; y = x + scale  # y belongs to x"),
    ("print", "(lambda *a: None)",  # the function of a call
     "print('a', y)  # said once",
     "(lambda *a: None)('a', y)  # said once"),
    ('"a"', '"b"', "print('a', y)", "print(\"b\", y)"),
    ("y - 1", "y", "y = y - 1 - x", "y = y - x"),
    ("y - 1", "y if x else 1", "y = y - 1 - x", "y = (y if x else 1) - x"),
    ("y * (x - 1)", "y\n- x", "return y * (x - 1)", "return (y\n               - x)"),
    ("2", "3", "scale=2", "scale=3"),  # a default value
    ('print("a", (y))', "print(y)",  # a statement goes with its comment
     "print('a', y)  # said once", "print(y)"),
    ('print("a", y)', "", "print('a', y)  # said once", "pass"),
    ('y = y - 1 - x\nprint("a", y)', "if x:\n    y = 1",
     "y = y - 1 - x\n            print('a', y)  # said once",
     "if x:\n                y = 1"),
])
def test_a_change_touches_nothing_but_its_own_code(old, new, line, becomes):
    """One expression or several statements, with the parentheses and the indentation they need."""
    assert SAMPLE.count(line) == 1
    assert sample_changed("Stepper.step", old, new) == SAMPLE.replace(line, becomes)


@pytest.mark.parametrize("function, old, new, message", [
    ("cached", "range(n)", "n",
     "sample.py, function cached: wanted once, found 2 times:\nrange(n)"),
    ("steps", "range(m)", "n",
     "sample.py, function steps: wanted once, found 0 times:\nrange(m)"),
    ("Stepper.step", "1 - x", "x", "found 0 times"),  # y - 1 - x is (y - 1) - x
    ("cached", "functools.lru_cache(maxsize=None)", "print", "found 0 times"),
    ("step", "y", "x", "sample.py, function step: there is no such function"),
    ("Stepper.step.y", "y", "x", "there is no such function"),
    ("Stepper.step", "y = x * scale", "if x:\n    y = 1", "cannot take the place of the old code"),
])
def test_a_change_that_does_not_fit_is_refused(function, old, new, message):
    """Code that is there twice or never, a decorator, a function that does not exist, and a
    statement in a place where it cannot stand."""
    with pytest.raises(ValueError, match=re.escape(message)):
        sample_changed(function, old, new)


def test_a_change_in_effect_changes_defaults_generators_and_cached_results(tmp_path, monkeypatch):
    """And afterwards everything is as before."""
    (tmp_path / "sample.py").write_text(SAMPLE, encoding="utf-8")
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import sample

    def results():
        return sample.Stepper().step(3), list(sample.steps(3)), sample.cached(2)

    before = results()
    assert before == (4, [0, 1, 2], [0, 1, 0, 1])
    for function, old, new, after in [
            ("Stepper.step", "2", "3", (10, *before[1:])),
            ("steps", "yield i", "yield -i", (before[0], [0, -1, -2], before[2])),
            ("cached", "return [i for i in range(n)] + [i for i in range(n)]", "return n",
             (*before[:2], 2))]:
        change = {"file": "sample.py", "function": function, "old": old, "new": new}
        with changes.in_effect(change):
            assert results() == after
        assert results() == before


def test_a_changed_file_is_imported_as_the_project_does_it():
    assert changes.module_name("dpo.py") == "dpo"
    assert changes.module_name("lab/tabular.py") == "lab.tabular"
    assert changes.module_name("tests/test_1_optimum.py") == "test_1_optimum"


# ---- Find the bug

def test_there_are_thirty_bugs_or_more_and_all_are_different():
    assert len(BUGS) >= 30
    assert len({(b["file"], b["function"], b["old"], b["new"]) for b in BUGS}) == len(BUGS)
    for b in BUGS:
        assert b.keys() >= {"file", "function", "old", "new", "proof", "pitfall", "why", "hint"}
        assert ("show" in b) != ("train" in b)


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1))
def test_every_bug_is_seen_by_the_proof_named_for_it(number):
    """With the bug in effect the named proof fails. Without it the proof holds: the rest of this
    suite shows that."""
    this = BUGS[number - 1]
    with changes.in_effect(this):
        outcomes = run_proof(this["proof"])
    assert outcomes, f"{this['proof']} was not run: is it the name of a test?"
    assert "failed" in outcomes, f"{this['proof']} does not see bug {number}: {this['pitfall']}"


# ---- Every claim's test can fail

def test_every_claim_has_an_alteration():
    """The claims are the numbers with which docstrings of tests begin."""
    claimed = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        claimed |= set(re.findall(r'"""Claim (\d+)\b', file.read_text(encoding="utf-8")))
    assert len(claimed) >= 46
    assert {str(a["claim"]) for a in ALTERATIONS} == claimed


def name_of(alteration):
    return f"claim{alteration['claim']}-{alteration['file'].removesuffix('.py')}"


@pytest.mark.parametrize("alteration", ALTERATIONS, ids=name_of)
def test_a_claim_with_its_formula_altered_is_refuted(alteration):
    """Each claim has something altered: a sign, a lost beta, a factor. The alteration is in the
    test's own formula or in the function that the claim is about."""
    with changes.in_effect(alteration):
        outcomes = run_proof(alteration["proof"])
    assert outcomes, f"{alteration['proof']} was not run: is it the name of a test?"
    assert "failed" in outcomes, (
        f"{alteration['proof']} still holds with {alteration['new']!r} for {alteration['old']!r}")


# ---- Grading somebody's implementation

def judged(path, only=grading.FUNCTIONS, seconds=60, **options):
    """{name: verdict} on a file, from a judge in this process. The machine may be busy."""
    judge = Judge(lambda: load(path), only, path=str(path), seconds=seconds, **options)
    run(judge)
    torch.manual_seed(0)
    return judge.verdicts


def rows(verdicts):
    return "\n".join(map(grading.row, verdicts.values()))


def defined_in(file):
    """{name: node} of the functions that stand at the top level of a file."""
    return {n.name: n for n in ast.parse(read(file)).body if isinstance(n, ast.FunctionDef)}


def test_the_stubs_are_the_projects_signatures_and_docstrings():
    """Also where a student has filled them in: the promise must stay what is graded."""
    wanted = defined_in("dpo.py") | defined_in("losses.py")
    for name in ("main", "check_label_smoothing", "stray_mass"):
        del wanted[name]
    wanted["sequence_logps"] = defined_in("model.py")["sequence_logps"]
    assert set(grading.FUNCTIONS) == wanted.keys()
    stubs, _, _ = load(ROOT / "exercises" / "dpo.py")
    assert list(stubs) == list(grading.FUNCTIONS)
    for name, function in stubs.items():
        assert ast.unparse(wanted[name].args) == str(inspect.signature(function))[1:-1], name
        assert ast.get_docstring(wanted[name]) == inspect.getdoc(function), (
            f"write the stubs anew: python -m exercises.grading, {name}")


def test_every_function_has_a_proof_that_grades_it():
    """And every graded proof names such a function, and stands in a file that the grader reads.
    Otherwise it would never be run."""
    class Collector:
        def pytest_collection_modifyitems(self, items):
            self.items = [item for item in items if graded_by(item)]

    collector = Collector()
    run_pytest(ROOT / "tests", "--collect-only", plugin=collector)
    assert {graded_by(item) for item in collector.items} == set(grading.FUNCTIONS)
    assert {item.path for item in collector.items} <= set(PROOFS)
    for item in collector.items:
        kind, label = kind_of(item)
        assert len(label) < 40 if kind == "guard" else label in ("", True), item.nodeid


def test_your_functions_stand_wherever_the_project_holds_its_own():
    """Losses that are imported from dpo.py, and the table of losses, call a student's function. And
    afterwards every name means the project's own function again."""
    def h(*logps):
        return torch.tensor([2.0])

    def loss(*logps, beta=0.1):
        return "mine"

    def exchange(**functions):
        return exchanged({id(OWN[name]): function for name, function in functions.items()})

    zeros = torch.zeros(4, 1)
    before = [dict(vars(module)) for module in (dpo, losses, model)] + [dict(losses.LOSSES)]
    with exchange(preference_logits=h, ipo_loss=loss):
        assert dpo.preference_logits is losses.preference_logits is h
        assert losses.hinge_loss(*zeros, beta=0.25)[0].item() == 0.5
        assert dpo.dpo_loss(*zeros, beta=1.0)[0].item() == pytest.approx(math.log1p(math.exp(-2)))
        assert losses.LOSSES["ipo"](*zeros) == losses.ipo_loss(*zeros) == "mine"
    with exchange(dpo_loss=loss):
        assert losses.LOSSES["sigmoid"] is losses.dpo_loss is dpo.dpo_loss is loss
    with exchange(sequence_logps=loss):
        assert model.sequence_logps is loss
    after = [dict(vars(module)) for module in (dpo, losses, model)] + [dict(losses.LOSSES)]
    assert after == before


def run_python(*args):
    return subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8")


def printed(capsys, path, **options):
    """What the command prints, and its exit status. All of it fits on a screen."""
    status = grading.command(path, **options)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, out
    return status, out


def test_untouched_stubs_are_reported_as_not_started(tmp_path):
    """The command as a student runs it: no traceback, one line for each function, exit status 1."""
    (tmp_path / "mine.py").write_text(grading.stubs(), encoding="utf-8")
    done = run_python("pytest", f"--impl={tmp_path / 'mine.py'}")
    assert done.returncode == 1 and not done.stderr
    title, *lines = done.stdout.splitlines()
    assert title == "mine.py, function by function"
    assert lines == [f"{name:<19} not started" for name in grading.FUNCTIONS]


STYLES = sorted((ROOT / "tests" / "implementations").glob("*.py"))


@pytest.mark.parametrize("path", [ROOT / ANOTHER, *STYLES], ids=lambda path: path.stem)
def test_a_right_implementation_is_right_in_every_style(path):
    """Nine styles, from Python loops to torch.func. Eight of them were written by others, from the
    stubs alone. Every function is right, refuses what it must, and costs nothing more."""
    verdicts = judged(path)
    assert list(verdicts) == list(grading.FUNCTIONS)
    for verdict in verdicts.values():
        assert grading.told(verdict) == "right", "\n".join([grading.row(verdict),
                                                            *grading.details(verdict)])


MISTAKES = tomllib.loads(read("tests/mistakes.toml"))["mistake"]


def rounds():
    """The mistakes in rounds: in each of them, no function has more than one mistake."""
    found = []
    for mistake in MISTAKES:
        for one in found:
            if not {mistake["function"], mistake["graded"]} & {
                    name for m in one for name in (m["function"], m["graded"])}:
                one.append(mistake)
                break
        else:
            found.append([mistake])
    return found


def with_mistakes(mistakes):
    """The other implementation, with mistakes in it."""
    source = read(ANOTHER)
    for mistake in mistakes:
        source = changes.changed_source(mistake | {"file": ANOTHER}, source)
    return source


@pytest.mark.parametrize("number", range(len(rounds())))
def test_a_wrong_implementation_is_told_its_mistake(number, tmp_path):
    """tests/mistakes.toml holds what people do. Each mistake is named in the line of its function,
    within 80 columns, although other functions are wrong too. What has no mistake is not called
    wrong."""
    mistakes = {mistake["graded"]: mistake for mistake in rounds()[number]}
    (tmp_path / "mine.py").write_text(with_mistakes(mistakes.values()), encoding="utf-8")
    for name, verdict in judged(tmp_path / "mine.py").items():
        line = grading.row(verdict)
        if name not in mistakes:
            assert verdict["verdict"] in ("right", "waits") and not verdict["cost"], line
            assert not verdict["guards"] or any("guard" in m["says"] for m in mistakes.values())
            continue
        says = mistakes[name]["says"]
        assert says in line, f"{mistakes[name]['new']}\n{line}\n{verdict['remark']}"
        assert ("wrong" in line) == (not says.startswith("right")), line


def test_one_function_filled_in_is_right_and_the_others_are_not_started(tmp_path, capsys):
    """A function that calls one which is not there yet waits for it; it does not count as wrong.
    The first mistake in the order of the derivation is explained, with its line."""
    source = grading.stubs() + """

def gradient_weight(chosen_rewards, rejected_rewards):
    return torch.sigmoid(rejected_rewards - chosen_rewards)

def pair_logps(policy, batch):
    return response_logps(policy(batch["tokens"]), batch["tokens"], batch["response_mask"]).chunk(2)

def central_differences(f, x, eps=1e-5):
    return x @ x @ x
"""
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    status, out = printed(capsys, tmp_path / "mine.py")
    assert status == 1
    assert re.search(r"^gradient_weight +right$", out, re.M), out
    assert re.search(r"^pair_logps +waits for response_logps$", out, re.M), out
    assert re.search(r"^dpo_loss +not started$", out, re.M), out
    assert "Begin with central_differences. Your line" in out and "return x @ x @ x" in out, out


def test_one_repair_mends_all(tmp_path, capsys):
    """Where token_logps is wrong, what calls it waits for it, and is not called wrong."""
    shift = next(m for m in MISTAKES if m["graded"] == "token_logps" and "shift" in m["says"])
    (tmp_path / "mine.py").write_text(with_mistakes([shift]), encoding="utf-8")
    _, out = printed(capsys, tmp_path / "mine.py")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[1:17])
    assert lines.pop("token_logps").startswith("wrong: ")
    waiting = {name for name, told in lines.items() if told == "waits for token_logps"}
    assert waiting == {"response_logps", "pair_logps", "analytic_gradient", "gradient_check"}, out
    assert {told for name, told in lines.items() if name not in waiting} == {"right"}, out
    assert out.splitlines()[18].startswith("Begin with token_logps.")


def test_with_v_every_proof_is_listed(tmp_path):
    done = run_python("pytest", f"--impl={ROOT / ANOTHER}", "-v", "-k", "oracle")
    assert done.returncode == 0 and "holds   test_7_code.py::test_oracle_gather" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["robust_loss", "right"] or (
        done.stdout.splitlines()[-1].endswith("right"))


LOOP = "while True:\n        pass"
IMPATIENT = f'''
def {{name}}(*args, **kwargs):
    {LOOP}
'''


@pytest.mark.parametrize("name", grading.FUNCTIONS)
def test_an_endless_loop_is_given_up(name, tmp_path):
    """In each function in turn. It is reported with its line, and the others are judged as ever."""
    (tmp_path / "mine.py").write_text(read(ANOTHER) + IMPATIENT.format(name=name), "utf-8")
    only = [name, "token_logps", "gradient_weight"]
    verdicts = judged(tmp_path / "mine.py", [n for n in grading.FUNCTIONS if n in only], seconds=1)
    assert verdicts[name]["remark"] == "it does not return within 1 s"
    assert re.fullmatch(r"line \d+: (while True:|pass)", verdicts[name]["where"])
    for other in set(only) - {name}:
        assert verdicts[other]["verdict"] == "right"


# What a function may do to the grader: (the function, its body, what is said of it, of which line)
ACCIDENTS = {
    "exit": ("token_logps", "sys.exit(0)", "wrong: it raises SystemExit: 0", "sys.exit"),
    "exit at once": ("response_logps", "os._exit(0)",
                     "wrong: it raises SystemExit: 0", "os._exit(0)"),
    "end the process": ("sequence_logps", "os.abort()", "wrong: it ends Python (exit status ", ""),
    "a loop that catches everything": (
        "pair_logps", "while True:\n        try:\n            time.sleep(0.01)\n"
        "        except BaseException:\n            pass",
        "wrong: it does not return within 5 s", "time.sleep(0.01)"),
    "sleep": ("implicit_rewards", "time.sleep(1000)", "wrong: it does not return within 5 s",
              "time.sleep(1000)"),
    "a huge tensor": ("dpo_loss", "torch.ones(10 ** 12)", "wrong: RuntimeError: ",
                      "torch.ones(10 ** 12)"),
    "recursion": ("analytic_gradient", "return analytic_gradient(*a)",
                  "wrong: RecursionError: maximum recursion depth exceeded", "analytic_gradient("),
    "print": ("gradient_weight", "print(a)\n    return torch.sigmoid(a[1] - a[0])",
              "right; it prints (line ", None),
    "skip": ("central_differences", "import pytest\n    pytest.skip()",
             "wrong: it raises Skipped", "pytest.skip()"),
    "write": ("gradient_check", "open(__file__, 'w')",
              "wrong: PermissionError: the grader does not let", "open(__file__"),
    "a dtype for all": ("cdpo_loss", "torch.set_default_dtype(torch.float64)\n    return a[:3]",
                        "wrong: it changes the default dtype", None),
    "another judge": ("robust_loss", "torch.allclose = lambda *a, **k: True\n    return a[:3]",
                      "wrong: it changes torch.allclose", None),
    "a liar": ("ipo_loss", "return [torch.ones(()).as_subclass(Liar)] * 3",
               "wrong: it returned a Liar", None),
    "numbers too large": ("hinge_loss", "raise ValueError('x' * 10 ** 6)",
                          "wrong: it raises ValueError, whose message cannot be", "raise"),
    "changed arguments": ("missing_mass", "a[0].sub_(a[1])\n    return 1 - a[0].exp().mean()",
                          "right; 1 guard missing (it changes policy_logps)", None),
}


@pytest.fixture(scope="module")
def after_accidents(tmp_path_factory):
    """{function: verdict} of a file in which every function but one has an accident."""
    parts = ["import os, sys, time", "import torch", "class Liar(torch.Tensor): pass",
             "def preference_logits(w, l, rw, rl):",
             "    if not w.shape == l.shape == rw.shape == rl.shape: raise ValueError",
             "    return w - l - (rw - rl)"]
    for name, body, _, _ in ACCIDENTS.values():
        parts.append(f"def {name}(*a, **k):\n    {body}")
    path = tmp_path_factory.mktemp("accidents") / "mine.py"
    path.write_text("\n".join(parts), encoding="utf-8")
    verdicts, remarks = grading.grade_file(path, seconds=5)
    assert remarks == [] and path.read_text(encoding="utf-8") == "\n".join(parts)
    return verdicts


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_an_accident_is_reported_as_what_it_is(accident, after_accidents):
    """In a process of its own. It is told in one line, with the student's own line where Python
    knows it. What comes between is judged as ever."""
    name, _, says, where = ACCIDENTS[accident]
    verdict = after_accidents[name]
    assert says in grading.row(verdict), grading.row(verdict)
    assert where is None or where in verdict["where"], verdict["where"]
    assert grading.told(after_accidents["preference_logits"]) == "right"


def test_a_file_that_ends_early_keeps_what_it_has_earned(tmp_path):
    """sys.exit at its end, a failing line, an import of the project's own functions."""
    source = """import sys
from dpo import dpo_loss
from dpo import preference_logits as h
import torch
def gradient_weight(c, r):
    return torch.sigmoid(r - c)
def hinge_loss(*logps, beta=0.1):
    return torch.relu(1 - beta * h(*logps)), *implicit_rewards(*logps, beta)
def implicit_rewards(w, l, rw, rl, beta):
    if not beta > 0: raise ValueError
    return beta * (w - rw).detach(), beta * (l - rl).detach()
sys.exit(0)
"""
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    only = ["implicit_rewards", "dpo_loss", "gradient_weight", "hinge_loss"]
    verdicts, remarks = grading.grade_file(tmp_path / "mine.py", only)
    assert remarks == ["line 12: SystemExit: 0"]
    assert {name: grading.told(v) for name, v in verdicts.items()} == {
        "implicit_rewards": "right", "dpo_loss": "not started", "gradient_weight": "right",
        "hinge_loss": "waits for preference_logits"}


def test_grading_in_a_notebook_cell(capsys):
    """grade(...) takes functions, prints a line for each, and leaves the project's own in place. It
    also works twice in one process."""
    def right(w, l):
        return torch.sigmoid(l - w)

    def flipped(w, l):
        return torch.sigmoid(w - l)

    def project():
        return {name: getattr(module, name) for name, module in grading.FUNCTIONS.items()}

    before = project()
    for weight in (flipped, right):
        assert grading.grade(gradient_weight=weight) == (weight is right)
        out = capsys.readouterr().out
        assert ("the sign is flipped" in out) == (weight is flipped)
        assert ("right\n" in out) == (weight is right)
        assert len(out.splitlines()) <= 4, "only what was asked for"
    assert before == project()
    for wrong in ({}, {"dpo_los": print}):
        with pytest.raises(TypeError, match="dpo_loss"):
            grading.grade(**wrong)


@pytest.mark.parametrize("text, message", [
    ("def dpo_loss(:\n", "line 1: SyntaxError"),
    ("import torch\nimport absent_module\n", "line 2: ModuleNotFoundError"),
    ("x = 1\n", "defines none of token_logps"),
    (None, "no such file")])
def test_a_file_that_cannot_be_graded_says_why(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    with pytest.raises(pytest.UsageError, match=message):
        grading.command(tmp_path / "mine.py")


# ---- The exercise around the bugs

def test_every_symptom_shows():
    """Of every bug that shows in a few expressions, at least one comes out differently, and none
    fails in the healthy project."""
    for number, b in enumerate(BUGS, 1):
        if "show" not in b:
            continue
        with find_the_bug.quietly():
            lines = find_the_bug.symptom(number).splitlines()
        values = {"healthy": [], "buggy": []}
        for line in lines:
            for whose in values:
                if line.startswith(f"    {whose} "):
                    values[whose].append(line.split(maxsplit=1)[1])
        healthy, buggy = values["healthy"], values["buggy"]
        assert len(healthy) == len(buggy) == len(b["show"])
        assert healthy != buggy, f"bug {number} does not show in {b['show']}"
        assert not any("Error" in value for value in healthy), f"bug {number}: {healthy}"


def bug_with(start):
    """The number of the bug whose pitfall begins like this."""
    return next(n for n, b in enumerate(BUGS, 1) if b["pitfall"].startswith(start))


def test_a_symptom_in_training_is_a_table_beside_the_healthy_run(monkeypatch):
    """In a smaller run. With swapped columns every training curve looks healthy and the true reward
    falls."""
    usual = find_the_bug.short_run

    def smaller(folder, flags, **size):
        usual(folder, flags, texts=1600, pairs=2560)

    monkeypatch.setattr(find_the_bug, "short_run", smaller)
    with find_the_bug.quietly():
        table = find_the_bug.symptom(bug_with("Chosen and rejected are swapped"))
    rows = {line[:46].strip(): line[46:].split() for line in table.splitlines()}
    reward = rows["true reward, reference -> policy, exact"]
    healthy, buggy = float(reward[2]), float(reward[5])
    assert healthy > buggy + 0.1
    loss = rows["DPO loss, nats, step 0 -> last"]
    assert loss[0] == loss[3] == "0.693"


def test_nothing_of_a_bug_stays_behind():
    rewards = torch.tensor(1.0), torch.tensor(0.0)
    before = dpo.gradient_weight(*rewards)
    with changes.in_effect(BUGS[bug_with("The weight's sign") - 1]):
        assert dpo.gradient_weight(*rewards) != before
    assert dpo.gradient_weight(*rewards) == before


def test_the_tool_lists_hints_copies_and_reveals(tmp_path, monkeypatch, capsys):
    """As a student uses it. All but the first call run in this process."""
    done = run_python("exercises.find_the_bug", "39")
    out = done.stdout + done.stderr
    assert done.returncode == 0, out
    assert "healthy   0.5" in out and "buggy     0.75" in out and "Ties" not in out, out

    def tool(*args):
        monkeypatch.setattr(sys, "argv", ["find_the_bug", *args])
        find_the_bug.main()
        return capsys.readouterr().out
    listed = tool()
    assert all(f"{n:>3}  shows in" in listed for n in range(1, len(BUGS) + 1))
    assert BUGS[38]["hint"] in tool("39", "--hint")
    assert "world.py" in tool("39", "--copy", str(tmp_path))
    copied = (tmp_path / "world.py").read_text(encoding="utf-8")
    assert BUGS[38]["new"] in copied and BUGS[38]["old"] not in copied
    with pytest.raises(SystemExit, match="left as it is"):
        tool("39", "--copy", str(tmp_path))
    revealed = tool("39", "--reveal")
    assert "Ties count as wins" in revealed
    assert "+    wins = below + ref_mass  # (K,)" in revealed
    for number in ("0", str(len(BUGS) + 1)):
        with pytest.raises(SystemExit, match=f"numbered 1 to {len(BUGS)}"):
            tool(number)


def test_the_proofs_can_be_run_with_a_bug_in_effect():
    done = run_python("pytest", "--bug", "39", "-q", "tests/test_world.py", "-k", "win_rate")
    assert done.returncode == 1 and "1 failed" in done.stdout
