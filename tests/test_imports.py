"""Who imports whom. Arrows between the project's files go one way, so that the core can be read
without what is built on it."""
import ast
import graphlib
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from conftest import ROOT

# The top level, from below. A file reaches only files of the lines above its own, through however
# many imports. train and rlhf stand on top: they are programs, and do not use each other.
LEVELS = [
    {"world", "dpo", "ppo"},
    {"losses", "model"},
    {"data"},
    {"evaluate"},
    {"train", "rlhf"},
]
# Which folders a folder's files may import from. The top level is called "".
ALLOWED = {
    "": {"", "support"},
    "support": {"", "support"},
    "lab": {"", "support", "lab"},
    "exercises": {"", "support", "lab", "exercises"},
    "notebooks": {"", "support", "lab", "exercises", "notebooks"},
    "tests": {"", "support", "lab", "exercises", "notebooks", "tests"},
}


def modules():
    """{name: file} of the project's modules. A file of the top level, of tests/ or of notebooks/
    has its bare name, as in its import; a file of any other folder has the folder's name before
    it. conftest.py is pytest's, and nothing imports it but tests."""
    found = {}
    for folder in ALLOWED:
        for file in sorted((ROOT / folder).glob("*.py")):
            bare = folder in ("", "tests", "notebooks")
            name = file.stem if bare else f"{folder}.{file.stem}"
            if file != ROOT / "conftest.py":
                assert name not in found, f"two modules are called {name}"
                found[name] = file
    return found


MODULES = modules()
TOP = {name for name, file in MODULES.items() if file.parent == ROOT}


def folder_of(name):
    file = MODULES[name]
    return "" if file.parent == ROOT else file.parent.name


def imports_of(file):
    """The import statements of a file, a list of (statement, the functions that it stands in)."""
    found = []

    def visit(node, functions):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append((node, functions))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            functions = [*functions, getattr(node, "name", "lambda")]
        for child in ast.iter_child_nodes(node):
            visit(child, functions)
    visit(ast.parse(Path(file).read_text(encoding="utf-8")), [])
    return found


def imported(statement):
    """The project's modules that an import statement names, a set."""
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    else:
        assert statement.level == 0, "relative imports are not used here"
        # "from support import files" names a module, "from dpo import dpo_loss" a function
        names = [f"{statement.module}.{alias.name}" for alias in statement.names]
        names.append(statement.module)
    return {name for name in names if name in MODULES}


@lru_cache(maxsize=None)
def graph(inside_functions):
    """{module: the modules that it imports}, with or without the imports inside functions."""
    arrows = {}
    for name, file in MODULES.items():
        arrows[name] = set()
        for statement, functions in imports_of(file):
            if inside_functions or not functions:
                arrows[name] |= imported(statement)
    return arrows


def reach(start, arrows):
    """All modules that importing a module brings along."""
    found, ahead = set(), [start]
    while ahead:
        for name in arrows[ahead.pop()] - found:
            found.add(name)
            ahead.append(name)
    return found


def test_the_graph_is_that_of_the_project():
    """Some arrows that are certainly there. Without them the tests below would see nothing."""
    arrows = graph(inside_functions=False)
    assert "dpo" in arrows["losses"] and "support.run" in arrows["train"]
    assert "support.trie" in arrows["evaluate"] and "support.files" in arrows["support.run"]
    assert "lab.tabular" in arrows["test_1_optimum"]
    assert "world" in reach("train", arrows)


def test_nothing_imports_in_a_circle():
    """Imports inside functions count."""
    arrows = graph(inside_functions=True)
    circle = None
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
    assert circle is None, f"each of these is imported by the one before it: {circle}"


@pytest.mark.parametrize("folder", ALLOWED, ids=lambda folder: folder or "top")
def test_no_folder_imports_from_above(folder):
    """Neither the top level nor support/ imports lab/. exercises/ does not import tests/. Imports
    inside functions count."""
    arrows = graph(inside_functions=True)
    for name in MODULES:
        if folder_of(name) == folder:
            for other in arrows[name]:
                assert folder_of(other) in ALLOWED[folder], f"{name} imports {other}"


def test_the_top_level_has_no_arrow_upward():
    """Importing a file of the top level brings along only files of lower levels, whatever way the
    imports take through support/. And support/ needs neither of the two programs."""
    assert set.union(*LEVELS) == TOP, "every file of the top level has its place in LEVELS"
    arrows = graph(inside_functions=False)
    below = set()
    for level in LEVELS:
        for name in level:
            above = reach(name, arrows) & TOP - below
            assert not above, f"{name} reaches {above}"
        below |= level
    for name in MODULES:
        if folder_of(name) == "support":
            assert not reach(name, arrows) & LEVELS[-1], f"{name} needs a program"


def test_the_mathematics_needs_nothing_of_the_project():
    arrows = graph(inside_functions=False)
    for name in ("world", "dpo", "ppo"):
        assert not arrows[name], f"{name} imports {arrows[name]}"


def test_imports_inside_functions_stand_in_main_alone():
    """main is a program's own part, and no other file uses it. In any other function an import
    would hide an arrow from a reader of the file's head."""
    for name, file in MODULES.items():
        if folder_of(name) in ("", "support"):
            for statement, functions in imports_of(file):
                if imported(statement):
                    assert functions in ([], ["main"]), f"{name}, line {statement.lineno}"


def loaded_by(*steps):
    """What a new Python process has loaded after each step: the names of all modules, a set for
    each. steps: lists of names to import, one after the other."""
    lines = [f"import {', '.join(names)}; print(*sys.modules)" for names in steps]
    code = "\n".join(["import sys", *lines])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_measuring_and_learning_import_no_matplotlib_and_no_lab():
    """Everything of the top level but train, and all of support/ but its figures: without
    matplotlib. train draws figures at its end. Nobody loads lab/."""
    support = {name for name in MODULES if folder_of(name) == "support"}
    support -= {"support.__init__", "support.figures"}
    loaded, with_train = loaded_by(sorted(TOP - {"train"} | support), ["train"])
    assert "torch" in loaded, "the list of modules is not the process's"
    assert "matplotlib" not in loaded
    assert not {name for name in loaded if name.split(".")[0] in ("lab", "exercises")}
    assert not {name for name in with_train if name.split(".")[0] == "lab"}
