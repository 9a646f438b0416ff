"""docs/change-it.md: each recipe is carried out on a copy of the project.

The diff must fit today's files. It must keep to its limits. The command must print what the page
says. An oracle that is not the recipe's own code decides whether the change works.
"""
import csv
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import world
from conftest import ROOT
from exercises import find_the_bug
from lab import tabular
from tools import assert_same, vector

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "change-it.md").read_text(encoding="utf-8")
FOLDERS = ("support", "lab", "exercises", "notebooks", "tests", "docs")
UPDATE = "update docs/change-it.md"
MOST_FILES, MOST_LINES = 2, 25  # of a recipe that changes the project; tests come on top


# ---- A recipe: a section of the page

def section(title):
    """The text below the heading "## N. title"."""
    match = re.search(rf"^## \d\. {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.M)
    assert match, f"docs/change-it.md has no section {title!r}"
    return match[1]


def hunks(title):
    """The changes of a recipe: a list of (file, old lines, new lines, added lines)."""
    found = []
    for block in re.findall(r"^```diff\n(.*?)^```", section(title), re.DOTALL | re.M):
        for line in block.splitlines():
            if line.startswith("+++ "):
                file = line.removeprefix("+++ b/")
            elif line.startswith("@@"):
                found.append((file, [], [], []))
            elif not line.startswith("--- "):
                mark, text = line[:1] or " ", line[1:]  # an editor may strip an empty line
                _, old, new, added = found[-1]
                if mark in " -":
                    old.append(text)
                if mark in " +":
                    new.append(text)
                if mark == "+":
                    added.append(text)
    return found


def commands(title):
    """The commands of a recipe: a list of (words, the lines that the page shows below it)."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", section(title), re.DOTALL | re.M):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            lines = part.splitlines()
            n = 1  # a command goes on until its quotes are closed
            while not is_complete("\n".join(lines[:n])):
                n += 1
            words = shlex.split("\n".join(lines[:n]).replace("\\\n", " "))
            found.append((words, lines[n:]))
    return found


def is_complete(text):
    if text.endswith("\\"):
        return False
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


# ---- Carrying it out

@pytest.fixture
def project(tmp_path):
    """A copy of the project, without what runs have left and without figures."""
    copy = tmp_path / "project"
    copy.mkdir()
    for pattern in ("*.py", "*.md", "*.toml", "*.txt"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, copy)
    leave_out = shutil.ignore_patterns("__pycache__", "*.png")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=leave_out)
    (copy / "out").mkdir()
    return copy


@pytest.fixture
def project_with_run(project, small_run):
    """The copy, with a finished run in out/toy."""
    shutil.copytree(small_run, project / "out" / "toy")
    return project


def apply(title, project):
    """Make the changes of a recipe. Every hunk must fit, and fit in one place only."""
    for file, old, new, _ in hunks(title):
        lines = (project / file).read_text(encoding="utf-8").split("\n")
        places = []
        for i in range(len(lines) - len(old) + 1):
            if lines[i:i + len(old)] == old:
                places.append(i)
        if not places:
            gone = [line for line in old if line not in lines] or old
            raise AssertionError(f"the recipe {title!r} no longer applies: {file} does not hold "
                                 f"the line\n{gone[0]}\nin this place; {UPDATE}")
        assert len(places) == 1, (f"the recipe {title!r} fits {file} in {len(places)} places; "
                                  f"give it more context: {UPDATE}\n" + "\n".join(old))
        lines[places[0]:places[0] + len(old)] = new
        (project / file).write_text("\n".join(lines), encoding="utf-8")


def run(words, project, fails=False):
    """What a command prints, run in the copy. fails: whether it is to end with an error."""
    assert words[0] == "python", f"not a python command: {words}"
    environment = os.environ | {"PYTHONPATH": "", "PYTHONIOENCODING": "utf-8", "TQDM_DISABLE": "1",
                                "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *words[1:]], cwd=project, env=environment,
                          capture_output=True, encoding="utf-8")
    assert (done.returncode != 0) == fails, (
        f"{shlex.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def follow(title, project):
    """Apply a recipe and run its commands. Each must print the lines that the page shows.

    Returns what each of them has printed, a list of texts.
    """
    apply(title, project)
    outputs = []
    for words, shown in commands(title):
        printed = run(words, project)
        outputs.append(printed)
        for line in filter(None, shown):
            assert line in printed.splitlines(), (
                f"{shlex.join(words)}\nprints\n{printed}\nThe page shows\n{line}\n"
                f"If the new output is right, {UPDATE}")
    return outputs


def changed_module(project, file):
    """A module of the copy, beside the one of the project. What it imports is the project's."""
    spec = importlib.util.spec_from_file_location("changed_" + Path(file).stem, project / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- Every recipe keeps its limits

SMALL = ("A loss", "An annotator", "A tokenizer", "A PPO switch", "An experiment")
ALL = (*SMALL, "A claim with its proof", "A bug to find")


def test_these_are_all_recipes():
    assert re.findall(r"^## \d\. (.*)$", PAGE, re.M) == list(ALL)


@pytest.mark.parametrize("title", ALL)
def test_a_recipe_applies_and_is_in_the_style_of_the_project(title, project):
    """It adds no line of more than 100 columns, and ruff finds nothing in the changed files."""
    apply(title, project)
    files = {file for file, _, _, _ in hunks(title)}
    for file, _, _, added in hunks(title):
        for line in added:
            assert len(line) <= 100, f"{file}: more than 100 columns; {UPDATE}\n{line}"
    python = sorted(file for file in files if file.endswith(".py"))
    if python and importlib.util.find_spec("ruff"):
        run(["python", "-m", "ruff", "check", "--no-cache", *python], project)


@pytest.mark.parametrize("title", SMALL)
def test_a_recipe_is_small(title):
    """At most 2 files and 25 added lines. If a change needs more, the design is wrong."""
    files = {file for file, _, _, _ in hunks(title)}
    lines = sum(len(added) for _, _, _, added in hunks(title))
    assert len(files) <= MOST_FILES, f"{title}: {len(files)} files. Change the design"
    assert 0 < lines <= MOST_LINES, f"{title}: {lines} added lines. Change the design"


# ---- The recipes, one by one

def test_a_loss(project_with_run):
    """The values are TRL's, for two betas (1e-6). Then the first loss of a training, where every
    margin is 0: half of ln 2 and half of e^0."""
    follow("A loss", project_with_run)
    loss = changed_module(project_with_run, "losses.py").LOSSES["discopop"]
    logps = vector(-5, -8), vector(-6, -7), vector(-5.5, -7.5), vector(-5.8, -7.2)
    assert_same(loss(*logps, 0.1)[0], vector(.878265, .796759), 1e-6, what="DiscoPOP, beta = 0.1")
    assert_same(loss(*logps, 1.0)[0], vector(.496585, 1.103187), 1e-6, what="DiscoPOP, beta = 1")
    metrics = (project_with_run / "out" / "discopop" / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in metrics.splitlines()]
    first = next(row["loss"] for row in rows if row["stage"] == "dpo" and "loss" in row)
    assert first == pytest.approx((math.log(2) + 1) / 2, abs=1e-5)


def test_an_annotator(project, monkeypatch):
    """Without a "not" the new annotator agrees with the true reward. Two "not" cost 2. A pair
    whose responses hold equally many "not" keeps its label. Of the others, many change."""
    follow("An annotator", project)
    score = changed_module(project, "world.py").ANNOTATORS["affirmative"]
    prompt, text = "comedy: the plot was", " very superb and dark. I loved it."
    assert score(prompt, text) == world.true_reward(prompt, text)
    text = " not superb and not very dark. I loved it."
    assert score(prompt, text) == pytest.approx(world.true_reward(prompt, text) - 2)

    monkeypatch.setitem(world.ANNOTATORS, "affirmative", score)
    human = data.make_preferences(2000, "human", seed=3)
    affirmative = data.make_preferences(2000, "affirmative", seed=3)
    changed = 0
    for before, after in zip(human, affirmative):
        if before.chosen.count(" not") == before.rejected.count(" not"):
            assert after == before, "who dislikes negation has nothing to change here"
        changed += after != before
    assert changed > 100, "the annotator's taste does not show in the labels"


def test_a_tokenizer(project):
    """A byte is a token, EOS is 256, and any text comes back. A run with it gets to its end."""
    follow("A tokenizer", project)
    tokenizer = changed_module(project, "support/tokenizers.py").get_tokenizer("bytes")
    for text in ("a review", "  two\n\ttab", "Fünf €, 日本語, \U0001f600", "<|endoftext|>", ""):
        tokens = tokenizer.encode_ordinary(text)
        assert tokens == list(text.encode("utf-8"))
        assert tokenizer.decode(tokens) == text
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)
    summary = json.loads((project / "out" / "bytes" / "summary.json").read_text(encoding="utf-8"))
    assert summary["flags"]["tokenizer"] == "bytes"
    assert math.isfinite(summary["loss"][0])


# Policy learning from random weights. It prints the last KL, and a sum of all weights, every bit
# of it.
LEARN = """
import copy, torch, data, rlhf
from model import GPT, GPTConfig
torch.manual_seed(0)
vocab = data.get_tokenizer("toy").n_vocab
config = GPTConfig(block_size=32, vocab_size=vocab, n_layer=1, n_head=1, n_embd=32)
reference = GPT(config).eval().requires_grad_(False)

def score(prompts, responses):
    return torch.tensor([sum(response) % 7 - 3.0 for response in responses])

for switch in SWITCHES:
    policy = copy.deepcopy(reference).requires_grad_(True)
    settings = rlhf.Settings(samples=256, batch_size=64, lr=1e-2, beta=0.1, **switch)
    history = rlhf.learn(policy, reference, score, [[1, 2, 3]], settings)
    print(history[-1]["kl"], sum(p.double().sum().item() for p in policy.parameters()).hex())
"""


def test_a_ppo_switch(project_with_run):
    """Off, it changes no bit of the weights that today's project learns. On, it does, and the
    policy ends closer to the reference. k3's value is that of lab.tabular.kl_estimators."""
    [printed] = follow("A PPO switch", project_with_run)
    off, on = printed.splitlines()
    assert off.startswith("k3_weight 0.0 last KL ") and on.startswith("k3_weight 3.0 last KL ")
    today = run(["python", "-c", LEARN.replace("SWITCHES", "[{}]")], ROOT)
    program = LEARN.replace("SWITCHES", "[{}, {'k3_weight': 1.0}]")
    off, on = run(["python", "-c", program], project_with_run).splitlines()
    assert off == today.strip(), "the switch is off, and yet it changes something"
    (kl_off, weights_off), (kl_on, weights_on) = off.split(), on.split()
    assert weights_on != weights_off, "the switch is on and changes nothing"
    assert float(kl_on) < 0.8 * float(kl_off), f"KL {kl_on} with the leash, {kl_off} without it"
    k3 = changed_module(project_with_run, "ppo.py").k3
    logps, ref_logps = -torch.rand(2, 5, 7, dtype=torch.float64)  # (B, S) each
    mask = torch.rand(5, 7) < 0.6  # (B, S)
    _, _, each = tabular.kl_estimators(logps, ref_logps)  # (B, S)
    assert_same(k3(logps, ref_logps, mask), (each * mask).sum(-1).mean(), 1e-12, what="k3")


def test_an_experiment(project, small_run):
    """Three runs and five betas make 15 rows. At the run's own beta the win rate is that of the
    run's summary. The optimum wins more often at a smaller beta. The figure is a PNG."""
    for seed in range(3):
        folder = project / "out" / "paper" / f"seed-{seed}"
        shutil.copytree(small_run, folder)
        (folder / "rlhf.json").write_text('{"rows": {}}', encoding="utf-8")
    follow("An experiment", project)
    with open(project / "docs" / "paper" / "optima.csv", encoding="utf-8", newline="") as f:
        rows = [{name: float(text) for name, text in row.items()} for row in csv.DictReader(f)]
    betas = [0.25, 0.5, 1.0, 2.0, 4.0]
    assert [(row["seed"], row["beta"]) for row in rows] == [
        (seed, beta) for seed in range(3) for beta in betas]
    win_rates = [row["win_rate"] for row in rows if row["seed"] == 0]
    assert win_rates == sorted(win_rates, reverse=True)
    summary = json.loads((small_run / "summary.json").read_text(encoding="utf-8"))
    assert summary["beta"] == 1.0
    assert win_rates[2] == pytest.approx(summary["optimal_win_rate_same_beta"], rel=1e-5)
    figure = (project / "docs" / "paper" / "optima.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 5000


def passed(printed):
    """How many tests pytest says have passed."""
    return int(re.search(r"(\d+) passed", printed)[1])


def test_a_claim_with_its_proof(project):
    """The claim holds, the altered claim does not, and the table of claims wants a row for it."""
    apply("A claim with its proof", project)
    [(words, _)] = commands("A claim with its proof")
    printed = run(words, project, fails=True)
    assert "1 failed, 3 passed" in printed, printed
    assert "test_the_table_of_claims_is_that_of_the_tests" in printed
    [test] = re.findall(r"^\+def (test_\w+)", section("A claim with its proof"), re.M)
    add_row(project, f"| 47 | the gain in reward is β times both KLs | "
                     f"[`{test}`](../tests/test_1_optimum.py) | Eq. 4 | "
                    "[01](../notebooks/01_the_rlhf_objective_and_its_optimum.ipynb) |")
    assert "4 passed" in run(words, project)


def add_row(project, row):
    """Add a row to the table of claims, at its end."""
    page = project / "docs" / "claims.md"
    table, rest = page.read_text(encoding="utf-8").split("\n\n## Misprints", 1)
    page.write_text(f"{table}\n{row}\n\n## Misprints{rest}", encoding="utf-8")


def test_a_bug_to_find(project):
    """It is the last of the list, its symptom is the one expected, and its proof fails. Healthy,
    the third token of four is drawn in 9% of the cases. With the bug it is never drawn."""
    number = len(find_the_bug.bugs()) + 1
    apply("A bug to find", project)
    readme = project / "README.md"
    text = re.sub(rf"{number - 1}(\s+)bugs", rf"{number}\1bugs", readme.read_text("utf-8"))
    readme.write_text(text, encoding="utf-8")
    (symptom, _), (proofs, _) = commands("A bug to find")
    assert symptom[-1] == str(number), f"the new bug is bug {number}; {UPDATE}"
    printed = run(symptom, project)
    healthy, buggy = re.search(r"healthy +(\S+)\n +buggy +(\S+)", printed).groups()
    assert float(healthy) == pytest.approx(0.087, abs=0.03)
    assert float(buggy) == 0
    assert "2 passed" in run(proofs, project)
