"""mutants.py: which mistakes it makes, and that its list of equivalent mutants is up to date."""
import ast
from collections import Counter

import pytest

import mutants
from conftest import ROOT

pytestmark = pytest.mark.slow

SOURCE = '''
"""A docstring, 1."""
LIMIT = 2.5


@cached(1)
def f(x: int, axis=-1):
    """Another, 2."""
    x = x * 3
    if x < 4 and not axis:
        raise ValueError(f"{x + 1} is too much")
    total = x.sum(axis)
    for y in x:
        total -= max(y, LIMIT)
    return total, x


if __name__ == "__main__":
    f(1)
'''
MADE = {
    "": [("LIMIT = 2.5", "LIMIT = 5.0")],
    "f": [
        ("x: int, axis=-1", "x: int, axis=-2"), ("x: int, axis=-1", "x: int, axis=-0"),
        ("x = x * 3", "x = x / 3"), ("x = x * 3", "x = x * 4"), ("x = x * 3", "pass"),
        ("if x < 4 and (not axis):", "if True:"), ("if x < 4 and (not axis):", "if False:"),
        ("x < 4 and (not axis)", "x < 4 or not axis"), ("x < 4 and (not axis)", "x < 4 and axis"),
        ("x < 4 and (not axis)", "x <= 4 and (not axis)"),
        ("x < 4 and (not axis)", "x >= 4 and (not axis)"),
        ("x < 4 and (not axis)", "x < 5 and (not axis)"),
        ("raise ValueError(f'{x + 1} is too much')", "pass"),
        ("total = x.sum(axis)", "total = x.mean(axis)"),
        ("for y in x:", "pass"),
        ("total -= max(y, LIMIT)", "total += max(y, LIMIT)"),
        ("total -= max(y, LIMIT)", "total -= min(y, LIMIT)"),
        ("total -= max(y, LIMIT)", "pass"),
        ("return (total, x)", "return None"), ("return (total, x)", "return (x, total)"),
    ],
}


def test_the_mistakes_of_a_small_file():
    """These and no others: texts, decorators, annotations, messages and the program's start are
    left alone. A first assignment is kept, since the next use of the name would fail without it."""
    made = mutants.mutants("sample.py", SOURCE)
    for function, wanted in MADE.items():
        got = [(m.old, m.new) for m in made if m.function == function]
        assert Counter(got) == Counter(wanted), function or "outside of functions"
    assert len(made) == sum(map(len, MADE.values()))


def test_a_mutant_differs_from_its_file_in_one_place():
    """Its source is that of the file with `new` in the place of `old`, once."""
    whole = ast.unparse(ast.parse(SOURCE))
    for m in mutants.mutants("sample.py", SOURCE):
        if m.new not in ("pass", "if True:", "if False:"):
            assert m.source() in [whole[:i] + m.new + whole[i + len(m.old):]
                                for i in range(len(whole)) if whole.startswith(m.old, i)]
        assert m.source() != whole


@pytest.mark.parametrize("file", mutants.TESTS)
def test_equivalent_mutants_are_few_and_are_mutants_of_the_file(file):
    """At most 5% of a file's mutants are listed as equivalent, each with its reason. Whoever
    changes the code takes the entry out, and asks anew."""
    made = Counter(m.name for m in mutants.mutants(file))
    listed = {name: why for name, why in mutants.equivalents().items() if name[0] == file}
    for name, why in listed.items():
        assert made[name] == 1, f"tests/equivalent.toml lists what is no mutant: {name}"
        assert len(why.split()) > 5, f"why can no proof see this? {name}"
    assert len(listed) <= 0.05 * len(made)
    for test in mutants.TESTS[file]:
        assert (ROOT / "tests" / f"test_{test}.py").exists()


def test_no_entry_is_listed_twice_or_for_another_file():
    listed = mutants.equivalents()
    assert {name[0] for name in listed} <= mutants.TESTS.keys()
    text = (ROOT / "tests" / "equivalent.toml").read_text(encoding="utf-8")
    entries = mutants.tomllib.loads(text)["reason"]
    assert sum(len(entry["mutants"]) for entry in entries) == len(listed)


class Only:
    """mutants.mutants, but only those of these names."""

    def __init__(self, *names):
        self.names, self.every = names, mutants.mutants

    def __call__(self, file):
        return [m for m in self.every(file) if m.name[1:] in self.names]


def test_a_mistake_is_killed_and_an_equivalent_mutant_lives(monkeypatch, tmp_path):
    """Two mutants in processes of their own: a mask of every token is seen by a proof, which is
    named. The first mutant of the list of equivalents is seen by none."""
    unseen = next(name for name in mutants.equivalents() if name[0] == "data.py")[1:]
    seen = ("pad", "return (tokens, (position >= start) & (position < stop))",
            "return (tokens, (position >= start) | (position < stop))")
    monkeypatch.setattr(mutants, "mutants", Only(seen, unseen))
    tried = {m.name[1:]: proof for m, proof in mutants.try_all(["data.py"], tmp_path)}
    assert tried.keys() == {seen, unseen}
    assert tried[unseen] is None and tried[seen].startswith("tests/test_data.py::")
