"""exercises/grade_class.py: a class of right, wrong, empty, broken and hostile submissions.

Each gets what it has earned, as in a run of its own, and stops nobody else."""
import csv
import json

import pytest

from conftest import ROOT
from exercises import grade_class, grading

pytestmark = pytest.mark.slow

RIGHT = (ROOT / "tests" / "another_dpo.py").read_text(encoding="utf-8")
WEIGHT = """
import torch
def gradient_weight(chosen_rewards, rejected_rewards):
    return torch.sigmoid(rejected_rewards - chosen_rewards)
"""
ZEROS = """
def missing_mass(policy_logps, ref_logps):
    return 0 * policy_logps.sum()
def dpo_loss(w, l, rw, rl, beta=0.1):
    return 0 * w, 0 * w, 0 * w
"""
# Each defines a right gradient_weight, and a missing_mass and a dpo_loss that give zeros. What it
# does besides would earn more, or harm others, if nobody looked after it.
HOSTILE = {
    "sys_exit": WEIGHT + ZEROS + "import sys; sys.exit(0)",
    "os_exit": WEIGHT + ZEROS + "import os; os._exit(0)",
    "allclose": WEIGHT + ZEROS + "torch.allclose = torch.equal = lambda *a, **k: True",
    "runtest": WEIGHT + ZEROS + "import pytest; pytest.Function.runtest = lambda self: None",
    "skip": WEIGHT + ZEROS.replace("return", "__import__('pytest').skip(); return"),
    "judge": WEIGHT + ZEROS + """
import sys
for module in list(sys.modules.values()):
    if hasattr(module, "assert_same"):
        module.assert_same = lambda *a, **k: None""",
    "own": WEIGHT + ZEROS + """
import dpo, losses
from dpo import dpo_loss
missing_mass = losses.missing_mass
def implicit_rewards(*a, **k):
    return dpo.implicit_rewards(*a, **k)""",
    "liar": WEIGHT + ZEROS + """
class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *a, **k):
        return True
def missing_mass(policy_logps, ref_logps):
    return torch.zeros(()).as_subclass(Liar)""",
    "forger": WEIGHT + ZEROS.replace("return 0 * policy", """
    import os
    for line in ('{"verdict": {"function": "missing_mass", "verdict": "right"}}', '{"end": true}'):
        for descriptor in range(1, 20):
            try:
                os.write(descriptor, (line + "\\n").encode())
            except OSError:
                pass
    return 0 * policy"""),
    "writer": WEIGHT + ZEROS.replace("return 0 * policy", """
    import pathlib
    for path in pathlib.Path(__file__).parent.rglob("*"):
        path.write_text("gone")
    return 0 * policy"""),
    "for_ever": WEIGHT + ZEROS.replace("return 0 * policy", """
    while True:
        try:
            while True: pass
        except BaseException:
            pass
    return 0 * policy"""),
}


def told(row):
    """{function: what is said of it}, without those that are not started."""
    return {name: row[name] for name in grading.FUNCTIONS if row[name] != "not started"}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """(the folder, {student: row of the table}) of a class that was graded."""
    folder = tmp_path_factory.mktemp("class")
    work = folder / "work"
    work.mkdir()
    for name, source in HOSTILE.items():
        (work / f"{name}.py").write_text(source, encoding="utf-8")
    (work / "anna").mkdir()
    (work / "anna" / "dpo.py").write_text(RIGHT, encoding="utf-8")
    (work / "anna" / "notes.py").write_text("x = 1", encoding="utf-8")
    (work / "empty.py").write_text("", encoding="utf-8")
    (work / "broken.py").write_text("def dpo_loss(:\n", encoding="utf-8")
    (work / "nothing").mkdir()
    flipped = WEIGHT.replace("rejected_rewards - chosen", "chosen_rewards - rejected")
    (work / "=ben.py").write_text(flipped, encoding="utf-8")
    (work / "essay.pdf").write_bytes(b"%PDF")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    grade_class.main([str(work), "--out", str(folder / "grades.csv"), "--gradescope",
                      "--jobs", "2"])
    after = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    assert after == before, "a submission was changed"
    with open(folder / "grades.csv", encoding="utf-8", newline="") as table:
        return folder, {row["student"]: row for row in csv.DictReader(table)}


def test_every_submission_has_a_row(graded):
    assert set(graded[1]) == {"anna", "empty", "broken", "nothing", "'=ben", *HOSTILE}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_submission_gets_what_it_has_earned_and_no_more(graded, name):
    row = graded[1][name]
    assert row["gradient_weight"].startswith("right"), row
    assert float(row["points"]) == 5, row
    for function in told(row).keys() - {"gradient_weight"}:
        assert row[function].startswith("wrong: "), row


def test_the_others_get_what_they_get_alone(graded):
    """The right one all points, and the report of each is that of the single command."""
    folder, rows = graded
    points, _ = grade_class.read_points(ROOT / "exercises" / "points.toml")
    assert float(rows["anna"]["points"]) == sum(points.values())
    assert set(told(rows["anna"]).values()) == {"right"}
    alone, remarks = grading.grade_file(folder / "work" / "=ben.py")
    assert told(rows["'=ben"]) == {"gradient_weight": grading.told(alone["gradient_weight"])}
    assert "wrong" in rows["'=ben"]["gradient_weight"]
    for name, remark in (("broken", "line 1: SyntaxError"), ("nothing", "no Python file"),
                         ("empty", "")):
        assert remark in rows[name]["remarks"] and not told(rows[name])
        assert float(rows[name]["points"]) == 0


def test_each_student_gets_a_report(graded):
    """In Markdown, with the mistake and its place. For Gradescope: its results.json, with a score
    and a highest score for each function, and scores that add up to the points."""
    folder, rows = graded
    text = (folder / "grades" / "=ben.md").read_text(encoding="utf-8")
    assert text.startswith("# =ben: 0 of 125 points")
    assert "is large where the pair is ranked WRONGLY" in text
    for student, row in rows.items():
        name = student.removeprefix("'")
        results = json.loads((folder / "grades" / f"{name}.json").read_text(encoding="utf-8"))
        scores = [test["score"] for test in results["tests"]]
        assert sum(scores) == pytest.approx(float(row["points"]), abs=0.1)
        for test in results["tests"]:
            assert 0 <= test["score"] <= test["max_score"]
            assert test["status"] in ("passed", "failed")
            assert isinstance(test["output"], str) and test["name"] in grading.FUNCTIONS


@pytest.mark.parametrize("verdict, worth", [
    ({}, 1.0),
    ({"verdict": "waits", "waits_for": "dpo_loss"}, 1.0),
    ({"guards": ["beta <= 0"], "refuses": ["beta = nan"]}, 0.95),
    ({"guards": ["beta <= 0"]}, 0.9),
    ({"cost": "the model ran 2 times"}, 0.9),
    ({"verdict": "wrong"}, 0.0),
    ({"verdict": "not started"}, 0.0)])
def test_what_a_verdict_is_worth(verdict, worth):
    """Of 10 points, with the shares of exercises/points.toml."""
    _, share = grade_class.read_points(ROOT / "exercises" / "points.toml")
    whole = grading.new_verdict("dpo_loss") | verdict
    assert grade_class.points_of(whole, {"dpo_loss": 10}, share) == pytest.approx(10 * worth)


@pytest.mark.parametrize("text, message", [
    ("[points]\ndpo_los = 3", "has no dpo_los"),
    ("[points]\ndpo_loss = -1", "dpo_loss = -1 must be a number"),
    ("[points]\ndpo_loss = true", "dpo_loss = True must be a number"),
    ("[points]\ndpo_loss = 1\n[share]\nright = 1", "must give right, guards and cost"),
    ("[share]\nright = 1\nguards = 0\ncost = 0", "must give the points"),
    ("points", "Expected")])
def test_points_that_mean_nothing_are_refused(tmp_path, text, message):
    (tmp_path / "points.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        grade_class.read_points(tmp_path / "points.toml")


def test_nothing_is_overwritten_and_bad_arguments_are_named(tmp_path, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a.py").write_text("x = 1", encoding="utf-8")
    work, out = str(tmp_path / "work"), tmp_path / "grades.csv"
    out.write_text("mine", encoding="utf-8")
    for arguments, message in [
            ([work, "--out", str(out)], "is left as it is"),
            ([work, "--out", str(tmp_path / "grades")], "name a file such as grades.csv"),
            ([str(tmp_path / "no"), "--out", "a.csv"], "there is no such folder"),
            ([work, "--out", str(tmp_path / "b.csv"), "--points", "no.toml"], "no.toml")]:
        with pytest.raises(SystemExit, match=message):
            grade_class.main(arguments)
    assert out.read_text(encoding="utf-8") == "mine"
    with pytest.raises(SystemExit):
        grade_class.main([work, "--out", "a.csv", "--jobs", "0"])
    assert "--jobs: 0 must be at least 1" in capsys.readouterr().err
