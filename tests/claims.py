"""A claim by its number: what it states, where the paper says it, what its proofs compare.

    python -m pytest --claims               the list of the claims; nothing is run
    python -m pytest --claim 9              runs the proofs of claim 9 and reports on each
    python -m pytest --claim 9 --altered    the same with the claim altered: the proof must fail

The table in docs/claims.md holds each claim, its place in a paper and its proofs. What a proof
compares stands in its docstring and in its calls of assert_same. tests/alterations.toml holds the
altered claims.
"""
import ast
import contextlib
import inspect
import re
import textwrap
import tomllib
from collections import Counter, namedtuple
from pathlib import Path

import pytest

from exercises import changes, compare

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.*?) \| .*? \|$", re.MULTILINE)
LINK = re.compile(r"\[([^]]+)\]\(([^)]+)\)")

# proofs: a list of "tests/test_1_optimum.py::test_advantages_vanish_at_the_optimum"
Claim = namedtuple("Claim", "number states where proofs")


def claims():
    """{number: Claim}, read from the table in docs/claims.md."""
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    found = {}
    for number, states, cell, where in ROW.findall(page):
        proofs = []
        for test, file in LINK.findall(cell):
            proofs.append(f"{file.removeprefix('../')}::{test.strip('`')}")
        found[int(number)] = Claim(int(number), plain(states), place(where), proofs)
    return found


def plain(markdown):
    """The text of a cell of the table, without the signs of Markdown."""
    return LINK.sub(r"\1, \2", markdown).replace("\\*", "*")


def place(where):
    """Where a paper says it. A cell that names no paper means the DPO paper."""
    where = re.sub(r"\[([\d.]+)\]\([^)]+\)", r"\1", where)  # the number of a paper is its address
    where = re.sub(r"\b\d{4}\.\d{5}\b", r"arXiv \g<0>", where)
    if "arXiv" not in where and "[" not in where:
        where = f"arXiv 2305.18290 (DPO), {where}"
    return plain(where).replace("misprints below", "misprints in docs/claims.md")


def claim_numbered(number):
    known = claims()
    if number not in known:
        raise pytest.UsageError(f"--claim {number}: the claims are numbered 1 to {len(known)}; "
                                "python -m pytest --claims lists them")
    return known[number]


def alterations(number):
    """{proof: the change of a claim's formula with which this proof must fail}"""
    text = (ROOT / "tests" / "alterations.toml").read_text(encoding="utf-8")
    return {f"tests/{a['proof']}": a for a in tomllib.loads(text)["alteration"]
            if a["claim"] == number}


# ---- What is printed

def wrapped(text, indent="", first=None):
    """The text in lines of 100 columns at most."""
    return textwrap.fill(" ".join(text.split()), 100, subsequent_indent=indent,
                         initial_indent=indent if first is None else first,
                         break_long_words=False, break_on_hyphens=False)


def listed():
    """The list of the claims, as text."""
    lines = []
    for claim in claims().values():
        lines += [wrapped(claim.states, " " * 4, f"{claim.number:>2}  "),
                  wrapped(claim.where, " " * 8)]
    return "\n".join(lines)


HEAD = f"    {'compared':<60}{'times':>6}{'largest difference':>20}{'allowed':>10}"


def table(notes):
    """A line for each thing that was compared, from the notes of assert_same.

    The line shows the comparison that came closest to what is allowed. Where more than three names
    differ in their numbers alone, such as "prefix (0, 1)" and "prefix (0, 2)", they share one.
    """
    alike = Counter(without_numbers(name) for name in {name for name, _, _ in notes})
    groups = {}
    for name, *numbers in notes:
        pattern = without_numbers(name)
        groups.setdefault(pattern if alike[pattern] > 3 else name, []).append(numbers)
    lines = []
    for name, group in groups.items():
        *before, last = textwrap.wrap(name.rstrip(","), 58)
        difference, tolerance = max(group, key=used_up)
        lines += [f"    {part}" for part in before]
        lines.append(f"    {last:<60}{len(group):>6}{difference:>20.1e}{tolerance:>10.1e}")
    return lines


def without_numbers(name):
    number = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    return re.sub(rf"{number}(?:, {number})*,?(?=\))|{number}", "..", name)


def used_up(numbers):
    """How much of what is allowed a difference uses up. Where it is nothing, the strictest wins."""
    difference, tolerance = numbers
    share = difference / max(tolerance, 1e-300)  # a tolerance may be 0
    return share, -tolerance


def asserted(function):
    """The assert statements of a proof, as code."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [ast.unparse(node.test) for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return [wrapped(code, " " * 8, " " * 4 + "assert ") for code in found]


def message(error):
    """The first words of an error, without the values that pytest adds to an assertion."""
    text = str(error).split("\nassert ")[0].split("\n +")[0].strip()
    if not text:
        return "an assert of the proof fails"
    text = textwrap.shorten(text, 280, placeholder=" ...")
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


class Report:
    """A plugin of pytest. It runs the proofs of a claim, and reports what each has compared.

    altered: each proof that has an alteration is run with it, and must fail.
    """

    def __init__(self, claim, altered=False):
        self.claim, self.altered = claim, altered
        self.alterations = alterations(claim.number) if altered else {}
        self.proofs = list(self.alterations) if altered else claim.proofs
        self.functions = {}  # proof -> its test function
        self.notes = {proof: [] for proof in self.proofs}
        self.cases = {proof: 0 for proof in self.proofs}  # how many were run
        self.errors = {proof: [] for proof in self.proofs}
        self.only_the_verdict = altered  # the project's conftest.py reads this

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        proof = item.nodeid.split("[")[0]
        alteration = self.alterations.get(proof)
        effect = changes.in_effect(alteration) if alteration else contextlib.nullcontext()
        self.functions[proof] = changes.functions(item.module)[item.originalname]
        compare.notes = self.notes[proof]
        try:
            with effect:
                return (yield)
        finally:
            compare.notes = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        proof = item.nodeid.split("[")[0]
        if call.when == "call":
            self.cases[proof] += 1
        if call.excinfo:
            self.errors[proof].append(message(call.excinfo.value))
        return (yield)

    def pytest_report_teststatus(self, report):
        """No dots: the report says all of it."""
        if report.when == "call" and report.outcome in ("passed", "failed"):
            return report.outcome, "", ""

    def summary(self):
        """The report, as text."""
        number, states, where, _ = self.claim
        title = f"Claim {number}, altered" if self.altered else f"Claim {number}"
        lines = [wrapped(f"{title}: {states}", "  ", ""), wrapped(f"Where: {where}", "  ", "")]
        for proof in self.proofs:
            lines += self.about(proof)
        size = len(self.proofs)
        if self.altered:
            refuted = sum(self.verdict(proof) == "REFUTED" for proof in self.proofs)
            lines.append(f"{refuted} of {size} alterations of claim {number} are refuted.")
        else:
            held = sum(self.verdict(proof) == "HOLDS" for proof in self.proofs)
            if any(self.notes.values()):
                lines.append("A difference is a share of the largest wanted value, or of 1 where "
                             "that is larger.")
            lines.append(f"{held} of {size} proofs of claim {number} hold.")
        return "\n".join(lines)

    def verdict(self, proof):
        if self.errors[proof]:
            return "REFUTED" if self.altered else "FAILS"
        if not self.cases[proof]:
            return "NOT RUN"
        return "STILL HOLDS" if self.altered else "HOLDS"

    def about(self, proof):
        """The lines about one proof."""
        file, test = proof.split("::")
        lines = [wrapped(f"{self.verdict(proof)}: {test}, in {file}", "  ", "")]
        if self.altered:
            change = self.alterations[proof]
            function = "this test" if change["function"] == test else change["function"]
            lines.append(f"  Altered is {function}, in {change['file']}:")
            lines += [wrapped(change[key], " " * 9, f"    {key}  ") for key in ("old", "new")]
        elif self.cases[proof]:
            lines.append(wrapped(inspect.getdoc(self.functions[proof]), "  "))
            first = next((p for p in self.proofs if self.notes[p]), None)
            lines += [HEAD] if proof == first else []
            lines += table(self.notes[proof]) or asserted(self.functions[proof])
        if self.errors[proof]:
            lines.append(wrapped(self.errors[proof][0], "      ", "  >>> "))
            if not self.altered:
                lines.append(f"      python -m pytest {file} -k {test} shows where.")
        return lines

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.write_line(self.summary())
