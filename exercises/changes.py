"""Changes of the project's own code: the bugs of exercises/bugs.toml, the alterations of the tests.

A change is a dict with four keys:

    file       such as "dpo.py", "support/trie.py" or "tests/test_1_optimum.py"
    function   the qualified name of a function in this file: "response_logps", "GPT.hidden"
    old        code inside this function: one expression, or one or several statements in a row
    new        the code that takes its place; where it is empty, the statements are dropped

`old` is looked for by syntax, not by text. Line breaks, comments, quotes and additional parentheses
make no difference. The function must hold it exactly once.
"""
import ast
import contextlib
import importlib
import inspect
import sys
import textwrap
import types
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# ---- The source with a change made

def changed_source(change, source=None):
    """The text of the file with the change made. All text beside the change stays as it is.

    source: a text of the file, by default what the file holds. Raises ValueError where `old` is not
    found exactly once, or where `new` does not fit in its place.
    """
    if source is None:
        source = (ROOT / change["file"]).read_text(encoding="utf-8")
    where = f"{change['file']}, function {change['function']}"
    tree = ast.parse(source)
    function = find_function(tree, change["function"])
    if function is None:
        raise ValueError(f"{where}: there is no such function")

    old, new = parse(change["old"], change["new"])
    found = list(places(function, old))
    if len(found) != 1:
        raise ValueError(f"{where}: wanted once, found {len(found)} times:\n{change['old']}")
    parent, field, siblings, i = found[0]
    first, last = siblings[i], siblings[i + len(old) - 1]
    if isinstance(parent, ast.Expr):  # the expression is a statement of its own
        first = last = parent

    # The new text must parse to this tree, in which the new nodes stand in the old ones' place.
    siblings[i:i + len(old)] = new
    if not isinstance(getattr(parent, field), list):
        setattr(parent, field, siblings[0])
    text = textwrap.dedent(change["new"]).strip() or "pass"
    for candidate in (text, f"({text})"):  # an expression may need parentheses in its place
        changed = replace(source, first, last, candidate)
        with contextlib.suppress(SyntaxError):
            if ast.dump(ast.parse(changed)) == ast.dump(tree):
                return changed
    raise ValueError(f"{where}: this cannot take the place of the old code:\n{change['new']}")


def find_function(tree, name):
    """The node of a function, found by its qualified name; None if there is none."""
    node = tree
    for part in name.split("."):
        inside = {n.name: n for n in getattr(node, "body", []) if hasattr(n, "name")}
        node = inside.get(part)
    return node


def parse(old, new):
    """The nodes of old and of new, two lists: one expression each, or the statements of both."""
    old, new = textwrap.dedent(old).strip(), textwrap.dedent(new).strip()
    if new:
        with contextlib.suppress(SyntaxError):
            return [expression(old)], [expression(new)]
    return ast.parse(old).body, ast.parse(new or "pass").body


def expression(code):
    """The node of one expression. Inside parentheses its lines may break anywhere."""
    return ast.parse(f"({code}\n)", mode="eval").body


def places(node, wanted):
    """Every place below a node where the wanted nodes stand in a row.

    Yields (parent, the parent's field, the list of siblings in it, the index of the first node).
    Decorators are left out: they do not belong to what a function does.
    """
    for field, value in ast.iter_fields(node):
        if field == "decorator_list":
            continue
        siblings = value if isinstance(value, list) else [value]
        for i, child in enumerate(siblings):
            if type(child) is type(wanted[0]):
                if as_text(siblings[i:i + len(wanted)]) == as_text(wanted):
                    yield node, field, siblings, i
            if isinstance(child, ast.AST):
                yield from places(child, wanted)


def as_text(nodes):
    """A list of nodes as text, without their positions: equal texts mean equal code."""
    return ast.dump(ast.Module(body=nodes, type_ignores=[]))


def replace(source, first, last, text):
    """The source with text in the place of everything from the first node to the last one."""
    lines = source.encode("utf-8").splitlines(keepends=True)  # a node's columns count bytes
    before = b"".join(lines[:first.lineno - 1]) + lines[first.lineno - 1][:first.col_offset]
    rest = lines[last.end_lineno - 1][last.end_col_offset:]
    if isinstance(first, ast.stmt) and rest.lstrip().startswith(b"#"):
        rest = b"\n"  # the comment was about the old statement
    after = rest + b"".join(lines[last.end_lineno:])
    text = text.replace("\n", "\n" + " " * first.col_offset)
    return before.decode("utf-8") + text + after.decode("utf-8")


# ---- A change in effect

@contextlib.contextmanager
def in_effect(change):
    """Inside this context, the function runs the changed code, wherever it was imported."""
    module, changed = changed_module(change)
    function = functions(module)[change["function"]]
    after = functions(changed)[change["function"]]
    before = {key: getattr(function, key) for key in EXCHANGED}
    for key in EXCHANGED:
        setattr(function, key, getattr(after, key))
    forget()
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(function, key, value)
        forget()


EXCHANGED = ("__code__", "__defaults__", "__kwdefaults__")


def changed_module(change):
    """The module of a change, and a second module: the same code with the change made."""
    module = importlib.import_module(module_name(change["file"]))
    changed = types.ModuleType(module.__name__)
    changed.__file__ = module.__file__
    with warnings.catch_warnings():
        # hypothesis looks into the file for what it runs, and after a change finds other lines
        warnings.simplefilter("ignore")
        exec(compile(changed_source(change), module.__file__, "exec"), changed.__dict__)
    return module, changed


def module_name(file):
    """The name under which a file is imported: "lab/tabular.py" is lab.tabular.

    The tests are no package. Each of them is imported by its own name, as pytest does it.
    """
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "tests" else parts)


def functions(module):
    """{qualified name: function} of a module's functions and methods, without decorators."""
    found = {}
    classes = [c for c in vars(module).values() if inspect.isclass(c)]
    own = [c for c in classes if c.__module__ == module.__name__]
    for owner in [module, *own]:
        for value in vars(owner).values():
            value = inspect.unwrap(getattr(value, "__func__", value))
            value = getattr(getattr(value, "hypothesis", None), "inner_test", value)
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                found[value.__qualname__] = value
    return found


def forget():
    """Empty the project's caches. A result computed without a bug must not be used with it."""
    for folder in (ROOT, ROOT / "support", ROOT / "lab"):
        for path in folder.glob("*.py"):
            module = sys.modules.get(module_name(path.relative_to(ROOT)))
            for value in list(vars(module).values()) if module else []:
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
