"""exercises/: every bug is seen by the proof named for it, the graded proofs accept another implementation and name the mistakes
of wrong ones, and the stubs are dpo.py's."""
import ast
import inspect
import re
import subprocess
import sys
import tomllib

import pytest
import torch

import dpo
from conftest import ROOT
from exercises import find_the_bug, grading

BUGS = find_the_bug.bugs()
ALTERATIONS = tomllib.loads((ROOT / "tests" / "alterations.toml").read_text(encoding="utf-8"))["alteration"]
ANOTHER = ROOT / "tests" / "another_dpo.py"


class Outcomes:
    """A plugin for a pytest run within this one: what its tests came to."""
    only_the_verdict = True

    def __init__(self):
        self.reports = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.reports.append(report)


def run_proof(proof):
    """The outcomes of one test, its parameters until the first failure, run here and now, with whatever is in effect."""
    outcomes = Outcomes()
    with find_the_bug.quietly():
        pytest.main([f"{ROOT / 'tests' / proof}", f"--rootdir={ROOT}", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore"], plugins=[outcomes])
    torch.manual_seed(0)
    return [r.outcome for r in outcomes.reports]


# ---- Find the bug

def test_there_are_thirty_bugs_or_more_and_all_are_different():
    assert len(BUGS) >= 30
    assert len({(b["file"], b["old"], b["new"]) for b in BUGS}) == len(BUGS)
    for b in BUGS:
        assert b.keys() >= {"file", "old", "new", "proof", "pitfall", "why", "hint"} and ("show" in b) != ("train" in b)


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1))
def test_every_bug_is_seen_by_the_proof_named_for_it(number):
    """With the bug in effect the named proof fails. (That it holds without is the rest of this suite's affair.)"""
    with find_the_bug.in_effect(BUGS[number - 1]):
        outcomes = run_proof(BUGS[number - 1]["proof"])
    assert outcomes, f"{BUGS[number - 1]['proof']} was not run: is it the name of a test?"
    assert "failed" in outcomes, f"{BUGS[number - 1]['proof']} does not see bug {number}: {BUGS[number - 1]['pitfall']}"


# ---- Every claim's test can fail

def test_every_claim_has_an_alteration():
    assert {a["claim"] for a in ALTERATIONS} == set(range(1, 47))


@pytest.mark.parametrize("alteration", ALTERATIONS, ids=lambda a: f"claim{a['claim']}-{a['file'].removesuffix('.py')}")
def test_a_claim_with_its_formula_altered_is_refuted(alteration):
    """The claim as it is not: another sign, a lost beta, a wrong factor, in the test's own formula or in the function it is about."""
    with find_the_bug.in_effect(alteration):
        outcomes = run_proof(alteration["proof"])
    assert outcomes, f"{alteration['proof']} was not run: is it the name of a test?"
    assert "failed" in outcomes, f"{alteration['proof']} still holds with {alteration['new']!r} for {alteration['old']!r}"


# ---- Grading somebody's implementation

def grade_file(path, only=grading.FUNCTIONS, *options):
    """A Grader that has run the proofs of the functions of a file."""
    grader = grading.Grader(grading.load(path), str(path), only)
    with find_the_bug.quietly():
        pytest.main([str(ROOT / "tests"), f"--rootdir={ROOT}", "-q", *options, "-p", "no:cacheprovider", "-W", "ignore"], plugins=[grader])
    return grader


def test_the_stubs_are_dpo_pys_signatures_and_docstrings():
    """Also when a student has filled them in: what is promised must not drift from what is graded."""
    wanted = {n.name: n for n in ast.parse((ROOT / "dpo.py").read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)}
    for name, function in grading.load(ROOT / "exercises" / "dpo.py").items():
        assert ast.unparse(wanted[name].args) == str(inspect.signature(function))[1:-1].replace("'", "'"), name
        assert ast.get_docstring(wanted[name]) == inspect.getdoc(function), f"write the stubs anew: python -m exercises.grading, {name}"
    assert set(grading.FUNCTIONS) == wanted.keys() - {"main"}


def test_every_function_has_a_proof_that_grades_it(request):
    source = "".join(f.read_text(encoding="utf-8") for f in (ROOT / "tests").glob("test_[1-9]_*.py"))
    graded = re.findall(r'@grades\("(\w+)"\)', source)
    assert set(graded) == set(grading.FUNCTIONS)


def test_untouched_stubs_are_reported_as_not_started(tmp_path):
    """The command as a student runs it: no traceback, every graded proof not started, a line a function, exit status 1."""
    (tmp_path / "mine.py").write_text(grading.stubs(), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pytest", f"--impl={tmp_path / 'mine.py'}"], cwd=ROOT, capture_output=True,
                          text=True, encoding="utf-8")
    assert done.returncode == 1 and not done.stderr
    assert "Traceback" not in done.stdout and "FAILURES" not in done.stdout and "Error" not in done.stdout
    for name in grading.FUNCTIONS:
        assert re.search(rf"^{name} +not started +0 of [1-9]", done.stdout, re.M), done.stdout[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert " not started" in last and "passed" not in last and "failed" not in last


def test_another_correct_implementation_passes_every_proof():
    grader = grade_file(ANOTHER)
    assert all(verdict == "holds" for results in grader.results.values() for _, verdict, _ in results), grader.summary()
    assert all(grader.results.values()), "a function without a result was not graded"


MISTAKES = {
    "mean instead of sum": ("if average else s)", "if True else s)", "response_logps", "you averaged over tokens; Eq. 7 sums"),
    "the weight's sign": ("return 1 - torch.sigmoid(chosen_rewards - rejected_rewards)",
                          "return torch.sigmoid(chosen_rewards - rejected_rewards)", "gradient_weight", "the sign is flipped"),
    "the weight's sign, in the gradient": ("return 1 - torch.sigmoid(chosen_rewards - rejected_rewards)",
                                           "return torch.sigmoid(chosen_rewards - rejected_rewards)", "analytic_gradient",
                                           "the weight's sign is flipped"),
    "rewards without beta": ("beta * (pc.detach() - rc), beta *", "(pc - rc).detach(), beta *", "dpo_loss", "rewards without beta"),
    "the prompt counted": ("zip(lp, response_mask[:, 1:].bool())", "zip(lp, (response_mask.flip(1).cumsum(1).flip(1) > 0)[:, 1:])",
                           "response_logps", "the prompt is counted"),
    "the reference ignored": ("h = (pc - rc) - (pr - rr)\n    e", "h = pc - pr\n    e", "dpo_loss", "the reference is ignored"),
    "beta outside": ("loss = bce(beta * h, torch.full_like(h, 1 - e), ", "loss = beta * bce(h, torch.full_like(h, 1 - e), ", "dpo_loss",
                     "beta stands outside"),
    "beta fixed at 0.1": ("loss = bce(beta * h, torch.full_like(h, 1 - e), ", "loss = bce(0.1 * h, torch.full_like(h, 1 - e), ", "dpo_loss",
                          "right at beta = 0.1 only"),
    "no shift": ("logits[:, :T-1].reshape", "logits[:, 1:].reshape", "token_logps", "have already seen token t"),
    "a forgotten return": ("    return 1 - torch.exp", "    1 - torch.exp", "missing_mass", "is a return missing?"),
    "multiplied by the mask": ("s = row[m].sum()", "s = (row * m).sum()", "response_logps", "nan: select with the mask"),
    "0/0": ("out.append(s / max(1, int(m.sum())) if", "out.append(row[m].mean() if", "response_logps", "an empty row gives nan: divide by at least 1"),
    "halves swapped": ("return lp[:n], lp[n:]", "return lp[n:], lp[:n]", "pair_logps", "chosen and rejected are swapped"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_implementation_is_told_its_mistake(mistake, tmp_path):
    old, new, name, message = MISTAKES[mistake]
    source = ANOTHER.read_text(encoding="utf-8")
    assert source.count(old) == 1
    (tmp_path / "mine.py").write_text(source.replace(old, new), encoding="utf-8")
    summary = grade_file(tmp_path / "mine.py", [name], "-x").summary()         # the first proof that fails names it
    assert re.match(rf"{name} +wrong", summary) and message in summary, summary


def test_one_function_filled_in_is_done_and_the_others_are_not_started(tmp_path):
    """And a function that calls one which is not there yet waits for it, rather than being wrong."""
    source = grading.stubs() + """

def gradient_weight(chosen_rewards, rejected_rewards):
    return torch.sigmoid(rejected_rewards - chosen_rewards)

def pair_logps(policy, batch):
    return response_logps(policy(batch["tokens"]), batch["tokens"], batch["response_mask"]).chunk(2)

def central_differences(f, x, eps=1e-5):
    return x @ x @ x
"""
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    summary = grade_file(tmp_path / "mine.py").summary()
    assert re.search(r"^gradient_weight +done +2 of 2", summary, re.M), summary
    assert re.search(r"^pair_logps +waits for response_logps", summary, re.M), summary
    assert re.search(r"^dpo_loss +not started +0 of", summary, re.M), summary
    assert "in your central_differences, line" in summary and "return x @ x @ x" in summary, summary


def test_grading_in_a_notebook_cell(capsys):
    """grade(...) takes functions, prints a line for each, and leaves the project's own in place; twice in one process."""
    before = {name: getattr(dpo, name) for name in grading.FUNCTIONS}
    for flipped in (True, False):
        weight = lambda w, l: torch.sigmoid((w - l) if flipped else (l - w))
        assert grading.grade(gradient_weight=weight) == (not flipped)
        printed = capsys.readouterr().out
        assert ("the sign is flipped" in printed) == flipped and ("done" in printed) != flipped
        assert len(printed.splitlines()) <= 3, "only what was asked for"
    assert before == {name: getattr(dpo, name) for name in grading.FUNCTIONS}
    for wrong in ({}, {"dpo_los": print}):
        with pytest.raises(TypeError, match="dpo_loss"):
            grading.grade(**wrong)


@pytest.mark.parametrize("text, message", [("def dpo_loss(:\n", "line 1: SyntaxError"), ("import torch\nimport absent_module\n", "line 2: ModuleNotFoundError"),
                                           ("x = 1\n", "defines none of token_logps"), (None, "no such file")])
def test_a_file_that_cannot_be_graded_says_why(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    with pytest.raises(pytest.UsageError, match=message):
        grading.load(tmp_path / "mine.py")


# ---- The exercise around the bugs

def test_every_symptom_shows(monkeypatch):
    """Of every bug that shows in a few expressions, at least one comes out differently, and none fails in the healthy project."""
    for number, b in enumerate(BUGS, 1):
        if "show" not in b:
            continue
        with find_the_bug.quietly():
            lines = find_the_bug.symptom(number).splitlines()
        healthy = [line.split(maxsplit=1)[1] for line in lines if line.startswith("    healthy")]
        buggy = [line.split(maxsplit=1)[1] for line in lines if line.startswith("    buggy")]
        assert len(healthy) == len(buggy) == len(b["show"])
        assert healthy != buggy, f"bug {number} does not show in {b['show']}"
        assert not any("Error" in value for value in healthy), f"bug {number}: {healthy}"


def test_a_symptom_in_training_is_a_table_beside_the_healthy_run(monkeypatch):
    """In small: swapped columns make every training curve look healthy and the true reward fall."""
    small = find_the_bug.short_run
    monkeypatch.setattr(find_the_bug, "short_run", lambda folder, flags, **size: small(folder, flags, texts=1600, pairs=2560))
    number = next(n for n, b in enumerate(BUGS, 1) if b["pitfall"].startswith("Chosen and rejected are swapped"))
    with find_the_bug.quietly():
        rows = {line[:46].strip(): line[46:].split() for line in find_the_bug.symptom(number).splitlines()}
    healthy, buggy = (float(rows["true reward, reference -> policy, exact"][i]) for i in (2, 5))
    assert healthy > buggy + 0.1
    assert rows["DPO loss, nats, step 0 -> last"][0] == rows["DPO loss, nats, step 0 -> last"][3] == "0.693"


def test_nothing_of_a_bug_stays_behind():
    before = dpo.gradient_weight(torch.tensor(1.0), torch.tensor(0.0))
    flipped = next(b for b in BUGS if b["pitfall"].startswith("The weight's sign"))
    with find_the_bug.in_effect(flipped):
        assert dpo.gradient_weight(torch.tensor(1.0), torch.tensor(0.0)) != before
    assert dpo.gradient_weight(torch.tensor(1.0), torch.tensor(0.0)) == before


def run_tool(*args):
    done = subprocess.run([sys.executable, "-m", "exercises.find_the_bug", *args], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout + done.stderr


def test_the_tool_lists_hints_copies_and_reveals(tmp_path, monkeypatch, capsys):
    """As a student uses it, in one process but for one call."""
    code, out = run_tool("39")
    assert code == 0 and "healthy   0.5" in out and "buggy     0.75" in out and "Ties" not in out, out

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
    assert "Ties count as wins" in revealed and "+        return (p * (below + q_rank)[rank]).sum()" in revealed
    for number in ("0", str(len(BUGS) + 1)):
        with pytest.raises(SystemExit, match=f"numbered 1 to {len(BUGS)}"):
            tool(number)


def test_the_proofs_can_be_run_with_a_bug_in_effect():
    done = subprocess.run([sys.executable, "-m", "pytest", "--bug", "39", "-q", "tests/test_world.py", "-k", "win_rate"], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1 and "1 failed" in done.stdout
