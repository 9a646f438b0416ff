"""A claim by its number: pytest --claim N states the claim, cites a paper, says what is compared.
With the claim altered it fails.

One claim is run here. The other files run the proofs of all claims, and test_exercises.py runs them
with the claims altered.
"""
import contextlib
import importlib
import io
import re
import tomllib

import pytest
from hypothesis import settings

import claims
from conftest import ROOT
from exercises import changes, compare
from tools import assert_same, vector

CLAIMS = claims.claims()
ALTERATIONS = tomllib.loads((ROOT / "tests/alterations.toml").read_text(encoding="utf-8"))
# 1e-10, or a comparison of every bit
TOLERANCE = r"\b\d*e-\d+\b|compared exactly"


def run(*args):
    """A pytest run within this one: its exit status, and what it prints."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    profile = settings.get_profile("proofs")
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = pytest.main([str(ROOT / "tests"), f"--rootdir={ROOT}", "-p",
                                  "no:cacheprovider", *args])
    finally:
        settings.register_profile("proofs", profile)
        settings.load_profile("proofs")
    printed.seek(0)
    return status, printed.read().strip()


def function_of(proof):
    file, test = proof.split("::")
    module = importlib.import_module(changes.module_name(file))
    return changes.functions(module)[test]


def report_of(number, altered=False, **results):
    """The report's text after each proof was run once, with these notes or errors."""
    report = claims.Report(CLAIMS[number], altered)
    for proof in report.proofs:
        report.functions[proof], report.cases[proof] = function_of(proof), 1
        report.notes[proof] = results.get("notes", [])
        report.errors[proof] = results.get("errors", [])
    return report.summary()


def flowing(text):
    return " ".join(text.split())


def test_there_are_46_claims():
    assert list(CLAIMS) == list(range(1, len(CLAIMS) + 1)) and len(CLAIMS) >= 46


@pytest.mark.parametrize("number", CLAIMS)
def test_a_report_states_cites_and_says_what_is_compared(number):
    """The report holds the statement and the place of the table, and the docstring of each proof.
    Each docstring names the claim and a tolerance. Lines have 100 columns at most."""
    claim = CLAIMS[number]
    report = report_of(number, notes=[("the result", 2e-16, 1e-10)])
    assert f"Claim {number}: {claim.states} Where: " in flowing(report)
    where = re.search(r"Where: (.*?) HOLDS", flowing(report))[1]
    assert re.search(r"arXiv \d{4}\.\d{5}|https?://", where), f"claim {number} cites no paper"
    assert not re.search(r"`|\\|\]\(", claim.states + where), "signs of Markdown are left"
    assert claim.proofs
    for proof in claim.proofs:
        words = flowing(function_of(proof).__doc__)
        assert re.match(rf"Claim {number}\b", words) and words in flowing(report)
        assert re.search(TOLERANCE, words), f"{proof} does not say its tolerance"
        assert re.search(r"the result +1 +2.0e-16 +1.0e-10\n", report)
    assert max(map(len, report.splitlines())) <= 100
    assert f"{len(claim.proofs)} of {len(claim.proofs)} proofs of claim {number} hold." in report


@pytest.mark.parametrize("number", CLAIMS)
def test_a_report_on_the_altered_claim_shows_the_alteration(number):
    """The old code, the new code and the message of the proof, for each alteration of the claim."""
    report = report_of(number, altered=True, errors=["beta is missing"])
    altered = [a for a in ALTERATIONS["alteration"] if a["claim"] == number]
    assert altered
    for alteration in altered:
        old, new = flowing(alteration["old"]), flowing(alteration["new"])
        assert f"old {old} new {new} >>> beta is missing" in flowing(report)
        assert f"tests/{alteration['proof']}" in CLAIMS[number].proofs
    assert report.count("REFUTED") == len(altered)
    assert report.endswith(f"{len(altered)} of {len(altered)} alterations of claim {number} are "
                           "refuted.")


def test_a_proof_that_was_not_run_or_still_holds_is_not_called_refuted():
    report = claims.Report(CLAIMS[2], altered=True)
    assert "NOT RUN" in report.summary() and "0 of 1 alterations" in report.summary()
    assert "STILL HOLDS" in report_of(2, altered=True)
    assert "0 of 1 proofs" in report_of(2, errors=["off by 3"])


def test_each_comparison_is_noted():
    """What, the largest difference and the tolerance, both as shares of the largest wanted value
    or of 1. Also where the comparison fails, and only while notes are taken."""
    compare.notes = notes = []
    try:
        assert_same(vector(8.5, 1), vector(8, 1), 0.1, what="the large")
        with pytest.raises(AssertionError, match="off by 0.25, allowed 0.1"):
            assert_same(vector(0.5), vector(0.25), 0.1, what="the small")
    finally:
        compare.notes = None
    assert_same(vector(1), vector(1), 0.1)
    assert notes == [("the large", 0.0625, 0.1), ("the small", 0.25, 0.1)]


def test_the_table_shows_the_comparison_that_came_closest():
    """Names that differ in their numbers alone share a line where there are more than three."""
    notes = [("Eq. 9", 1e-12, 1e-10), ("Eq. 9", 2e-12, 1e-6), ("Eq. 8", 0.0, 1e-6)]
    differences = {(0,): 1e-12, (0, 1): 5e-10, (2, -1): 1e-13, (0, 1, 2): 0.0}
    notes += [(f"prefix {prefix}", d, 1e-9) for prefix, d in differences.items()]
    assert [flowing(line) for line in claims.table(notes)] == [
        "Eq. 9 2 1.0e-12 1.0e-10", "Eq. 8 1 0.0e+00 1.0e-06", "prefix (..) 4 5.0e-10 1.0e-09"]


# ---- The commands

def test_the_output_in_the_page_is_that_of_the_command():
    """Except for the largest differences, which are other ones on another machine."""
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    example = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1].strip()
    status, printed = run("--claim", "3")
    assert status == 0

    def without_differences(text):
        return re.sub(r"\d\.\de[-+]\d\d(?= +1\.0e-07)", "", text)
    assert without_differences(printed) == without_differences(example)


def test_the_altered_claim_fails_and_the_proof_says_why():
    status, printed = run("--claim", "3", "--altered")
    assert status == 1
    assert "    old  vector(beta)\n    new  vector(1 / beta)\n  >>> dE[r]/dKL: got 0.3" in printed
    assert printed.endswith("1 of 1 alterations of claim 3 are refuted.")


def test_a_proof_that_fails_says_why():
    """The claim is altered as before, but this time nobody has asked for it."""
    (alteration,) = claims.alterations(3).values()
    with changes.in_effect(alteration):
        status, printed = run("--claim", "3")
    assert status == 1 and "FAILS: test_along_the_frontier" in printed
    assert ">>> dE[r]/dKL: got 0.3" in printed and "0 of 1 proofs of claim 3 hold." in printed


def test_the_list_of_the_claims_runs_nothing():
    status, printed = run("--claims")
    assert status == 0
    assert flowing(printed) == " ".join(
        f"{claim.number} {claim.states} {claim.where}" for claim in CLAIMS.values())


@pytest.mark.parametrize("args, message", [
    (["--claim", "0"], f"the claims are numbered 1 to {len(CLAIMS)}"),
    (["--claim", f"{len(CLAIMS) + 1}"], f"the claims are numbered 1 to {len(CLAIMS)}"),
    (["--claim", "Z"], "invalid int value"),
    (["--altered"], "--altered needs the number of a claim")])
def test_a_claim_that_does_not_exist_is_a_usage_error(args, message):
    status, printed = run(*args)
    assert status == pytest.ExitCode.USAGE_ERROR and message in printed, printed
