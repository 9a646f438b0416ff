"""The README is executed or compared: commands, flags, files and figures cannot drift."""
import ast
import csv
import json
import math
import re
import runpy
import shlex

import pytest
import torch

import experiments
import rlhf
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs" / "results.json").read_text(encoding="utf-8"))


def mean_se(values, percent=False, digits=3):
    """ "1.964 ± 0.010", the mean and standard error over seeds."""
    mean = sum(values) / len(values)
    se = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{mean:.1%} ± {100 * se:.1f}".replace("%", " %") if percent else f"{mean:.{digits}f} ± {se:.{digits}f}"


def toy_rows(runs):
    """The README's closing table, from the summaries of seeds 0, 1 and 2."""
    names = {"reference": "reference (SFT)", "plain": "plain DPO (Eq. 7 alone)", "dpo": "**DPO** (the default run)",
             "optimum_same_kl": "optimum at DPO's KL", "optimum_same_beta": "optimum at the same β"}
    for key, name in names.items():
        rows = [run["rows"][key] for run in runs]
        of = lambda column, **how: mean_se([r[column] for r in rows], **how)
        yield (f"| {name} | {of('reward')} | {of('kl')} | {of('objective')} | {of('win_rate', percent=True)} "
               f"| {of('wellformed', percent=True)} | {of('objective_all')} |")


def remedy_rows(remedies):
    for name, runs in remedies.items():
        of = lambda f, **how: mean_se([f(s) for s in runs], percent=True)
        yield (f"| {name} | {of(lambda s: s['captured'])} | {of(lambda s: s['policy_wellformed'])} "
               f"| {of(lambda s: s['objective'] / s['objective_optimal'])} "
               f"| {of(lambda s: s['objective_all'] / s['objective_all_optimal'])} |")


def paper(name):
    """The rows of an experiment's CSV, numbers as numbers."""
    def value(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(ROOT / "docs" / "paper" / f"{name}.csv", encoding="utf-8", newline="") as f:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(f)]


def comparison_rows():
    """The README's table of what DPO replaces, from docs/paper/who-labels.csv; the seconds from docs/paper/alone.json, the rlhf.json
    of a run of seed 0 with nothing else on the machine."""
    rows = paper("who-labels")
    alone = json.loads((ROOT / "docs" / "paper" / "alone.json").read_text(encoding="utf-8"))["rows"]
    for name, title in rlhf.TITLES.items():
        of = [r for r in rows if r["row"] == title]
        column = lambda key, **how: mean_se([r[key] for r in of], **how)
        samples = f"{of[0]['generated']:,.0f}" + (" an answer" if title.startswith("best") else "")
        shown = title.replace("pi*", "π\\*")
        yield (f"| {shown} | {of[0]['labels']:,.0f} | {samples} | {of[0]['models']:.0f} | {alone[name]['seconds']:.0f} "
               f"| {column('reward', digits=2)} | {column('kl', digits=2)} | {column('share', percent=True)} | {column('wellformed', percent=True)} |")


def gallery_figures():
    """The numbers of the gallery's sentences, from the CSVs; each must stand in the README as it is here."""
    def of(name, column, **where):
        rows = [r for r in paper(name) if all(r[k] == v for k, v in where.items())]
        assert len(rows) == 3, (name, where)
        return mean_se([column(r) if callable(column) else r[column] for r in rows], percent=True)
    share = lambda method, setting: of("fig2-left", "share_of_frontier", method=method, setting=setting)
    yield f"DPO reaches {share('DPO', 'beta 2')} of the possible gain at β = 2 and {share('DPO', 'beta 1')} at β = 1"
    yield f"PPO on the learned reward {share('PPO, learned reward', 'target KL 0.6')} at a target of 0.6 nats"
    yield f"{share('DPO', 'beta 0.5')} at β = 0.5, {share('DPO', 'beta 0.25')} at β = 0.25"
    yield f"PPO on the learned reward keeps {share('PPO, learned reward', 'target KL 2.5')} at 2.5 nats"
    yield f"best of 256 {share('best of N, learned reward', 'N 256')}"
    temperature = lambda method, t: of("fig2-right", "win_rate", method=method, temperature=t)
    yield (f"DPO {temperature('DPO', 0)} at temperature 0 and {temperature('DPO', 1)} at 1, PPO {temperature('PPO, learned reward', 0)} and "
           f"{temperature('PPO, learned reward', 1)}")
    win = lambda method: of("fig3", "win_rate", method=method, step="")
    yield f"base {win('base')}, Preferred-FT {win('Preferred-FT')}, DPO {win('DPO')}, best of 128 {win('best of 128 by r*')}"
    seen = lambda method, where: of("table1", "win_rate", method=method, prompts=where)
    yield (f"DPO {seen('DPO', 'trained')} and {seen('DPO', 'held out')}, PPO {seen('PPO, learned reward', 'trained')} and "
           f"{seen('PPO, learned reward', 'held out')}")
    best = lambda judge, n: of("fig4", "win_rate", judge=judge, N=n)
    yield (f"{best('r*', 16)} at N = 16 and {best('r*', 128)} at N = 128 by r\\*, {best('learned reward', 16)} and "
           f"{best('learned reward', 128)} by the learned reward")
    optimal = {r["seed"]: r["objective"] for r in paper("who-labels") if r["row"] == rlhf.TITLES["optimum"]}
    labels = lambda method, n: of("labels-and-samples", lambda r: r["objective"] / optimal[r["seed"]], method=method, labels=n)
    few = [r for r in paper("labels-and-samples") if r["method"] == "RLHF" and r["labels"] == 2500]
    stayed = sorted(f"{r['objective'] / optimal[r['seed']]:.1%}".replace("%", " %") for r in few if r["wellformed"] > 0.5)
    assert len(stayed) == 2, "the README tells of one run that fell apart"
    yield (f"from 2,500 labels DPO gets {labels('DPO', 2500)} of J\\*, RLHF {' and '.join(stayed)} in two runs; in the "
           "third PPO falls apart")
    yield f"From 20,000 they get {labels('DPO', 20000)} and {labels('RLHF', 20000)}"
    samples = lambda n: of("labels-and-samples", lambda r: r["objective"] / optimal[r["seed"]], method="RLHF, 40,000 labels", generated=n)
    yield f"{samples(2560)} from 2,560 samples to {samples(40960)} from 40,960"
    quality = json.loads((ROOT / "docs" / "paper" / "alone.json").read_text(encoding="utf-8"))["reward_models"]["human"]
    yield f"It ranks {quality['accuracy']:.1%} of fresh labels rightly where {quality['ceiling']:.1%} is the ceiling".replace("%", " %")
    yield f"even the best policy for this judge is worth only {of('who-labels', 'share', row=rlhf.TITLES['optimum-judge'])}"
    last = {r["seed"]: r for r in paper("over-optimisation") if r["method"].startswith("PPO")}           # the last of each seed
    hacked = [r for r in last.values() if r["wellformed"] < 0.5]
    best = [max(r["learned"] for r in paper("over-optimisation") if r["method"] == "tilted" and r["seed"] == seed) for seed in (0, 1, 2)]
    yield (f"{['no run', 'one run', 'two runs', 'all runs'][len(hacked)]} of three end in text that is no review, which the reward model scores "
           + " and ".join(f"{score:.1f}" for score in sorted(r["learned"] for r in hacked))
           + f" where its favourite reviews get about {sum(best) / 3:.1f}")
    all_text = {}                                          # PPO's true reward over all its text, by samples generated: its turn
    for r in paper("over-optimisation"):
        if r["method"].startswith("PPO"):
            all_text.setdefault(r["setting"], []).append(r)
    top = max(all_text.values(), key=lambda rows: sum(r["reward_all"] for r in rows))
    yield f"The turn is at {top[0]['setting']:,.0f} samples, a KL of {sum(r['kl'] for r in top) / 3:.1f} nats"
    for detail in experiments.DETAILS:
        if detail in ("as it is", "no ratio clip", "no learning rate annealing", "no gradient clipping", "no critic: REINFORCE++"):
            yield of("ppo-details", "share", detail=detail)
    for seed in (0, 1, 2):
        text = last[seed]["sample"]
        yield f"*{text.strip()}*"


def test_the_figures_in_the_gallery_are_those_of_the_recorded_runs():
    text = " ".join(README.split())
    for sentence in gallery_figures():
        assert sentence in text, f"README.md lacks: {sentence}"


def test_the_comparison_is_that_of_the_recorded_runs():
    for row in comparison_rows():
        assert row in README, f"README.md lacks the row\n{row}\nIt comes from docs/paper/who-labels.csv"


def test_every_experiment_is_recorded_for_three_seeds_and_shown():
    for name in experiments.EXPERIMENTS:
        assert {r["seed"] for r in paper(name)} == {0, 1, 2}, name
        assert f"(docs/paper/{name}.png)" in README and f"(docs/paper/{name}.csv)" in README, f"the gallery lacks {name}"


def test_the_closing_table_is_that_of_the_recorded_runs():
    assert len(RESULTS["default"]) == 3, "three seeds"
    for row in toy_rows(RESULTS["default"]):
        assert row in README, f"README.md lacks the row\n{row}\nIt comes from docs/results.json"


def test_the_figures_in_the_prose_are_those_of_the_recorded_runs():
    runs, of = RESULTS["default"], lambda values: mean_se(values, percent=True)
    assert f"DPO reaches {of([r['captured'] for r in runs])}" in README
    assert f"plain DPO {of([r['plain_captured'] for r in runs])}" in README
    assert f"{of([1 - r['rows']['plain']['wellformed'] for r in runs])} of what plain DPO writes" in README
    assert f"about {round(sum(r['seconds'] for r in runs) / 3)} s on 2 CPU cores" in README


def test_the_table_of_remedies_is_that_of_the_recorded_runs():
    assert all(len(runs) == 3 for runs in RESULTS["remedies"].values()), "three seeds"
    for row in remedy_rows(RESULTS["remedies"]):
        assert row in README, f"README.md lacks the row\n{row}\nIt comes from docs/results.json"


def test_the_recorded_runs_were_made_with_todays_defaults():
    for run in RESULTS["default"]:
        assert run["flags"] == {k: v for k, v in vars(train.parse_args(["--seed", str(run["flags"]["seed"])])).items()
                                if k not in ("resume", "out_dir", "device")}


def commands():
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S):
        for line in block.splitlines():
            line = line.split("#")[0].strip()
            if line:
                yield line


def test_the_two_commands_stand_in_the_readme():
    assert "pip install -r requirements.txt && python train.py" in commands()
    assert "pip install -r requirements.txt && python -m pytest" in commands()
    assert "pip install -r requirements.txt && python -m pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_train_command_in_the_readme_parses():
    train_commands = [shlex.split(c.split("python train.py", 1)[1]) for c in commands() if "train.py" in c and "--help" not in c]
    assert len(train_commands) >= 4
    for flags in train_commands:
        train.parse_args(flags)


def test_every_flag_named_in_the_readme_exists(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) | {"--prompt"}
    for file in ("conftest.py", "exercises/find_the_bug.py"):
        known |= set(re.findall(r'add(?:option|_argument)\("(--[a-z-]+)"', (ROOT / file).read_text(encoding="utf-8")))
    assert set(re.findall(r"`(--[a-z][a-z-]*)", README)) <= known


def test_the_gradient_check_runs_as_the_readme_says(capsys):
    """python dpo.py; the exercises' commands are run by test_exercises.py, the two of a newcomer by .ci/run."""
    assert any(c.startswith("python dpo.py") for c in commands())
    try:
        runpy.run_path(str(ROOT / "dpo.py"), run_name="__main__")
    finally:
        torch.set_default_dtype(torch.float32)
    printed = capsys.readouterr().out
    assert "log pi(y_w|x)" in printed and "WRONG" not in printed.split("Columns:")[0]


def test_every_module_named_by_a_command_exists():
    for command in commands():
        for module in re.findall(r"python -m ([\w.]+)", command):
            assert module == "pytest" or (ROOT / (module.replace(".", "/") + ".py")).exists(), command
        for file in re.findall(r"(?:--impl |tests/)[\w./]+", command):
            assert (ROOT / file.removeprefix("--impl ")).exists(), command


def claims_of_tests():
    """{claim: {(file, test), ...}}, from the docstrings, which begin with "Claim 7"."""
    found = {}
    for file in (ROOT / "tests").glob("test_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (match := re.match(r"Claim (\d+)\b", ast.get_docstring(node) or "")):
                found.setdefault(int(match[1]), set()).add((f"tests/{file.name}", node.name))
    return found


def test_the_table_of_claims_is_that_of_the_tests():
    """Each of the 46 has a row; the row names every test whose docstring claims it, and no other."""
    proofs, rows = claims_of_tests(), re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.*?) \| (.*?) \|$", README, re.M)
    assert [int(number) for number, *_ in rows] == list(range(1, 47))
    for number, _, cell, where, notebook in rows:
        named = {(file, test) for test, file in re.findall(r"\[`(\w+)`\]\(([\w./]+)\)", cell)}
        assert named == proofs.get(int(number), set()), f"claim {number}"
        assert named, f"claim {number} has no proof"
        for n in re.fullmatch(r"(\[?0\d.*?)", notebook)[0].split(", "):
            there = list((ROOT / "notebooks").glob(f"{n.strip('[')[:2]}_*.ipynb"))
            assert n == (f"[{n[1:3]}](notebooks/{there[0].name})" if there else n[:2]), f"claim {number}: notebook {n}"


def test_every_notebook_is_in_the_course():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"](notebooks/{path.name}) | " in README.split("## The course")[1].split("## Write it yourself")[0]


def test_every_metric_that_is_logged_is_in_the_glossary(small_run):
    keys = {k for line in (small_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for k in json.loads(line)}
    missing = {k for k in keys - {"stage", "step"} if f"`{k}`" not in README}
    assert not missing, f"the README's glossary lacks {missing}"


def test_every_file_in_the_readme_exists_and_every_module_is_in_it():
    for name in re.findall(r"\[`?([\w./]+)`?\]\(([\w./]+)\)", README):
        assert (ROOT / name[1]).exists(), f"README.md links to {name[1]}, which is not there"
    for module in set(ROOT.glob("*.py")) - {ROOT / "conftest.py"}:
        assert f"[`{module.name}`]({module.name})" in README, f"{module.name} is not in the table of files"


def test_requirements_are_pinned_and_explained():
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert f"`{name}`" in README, f"the README does not say why {name} is needed"
