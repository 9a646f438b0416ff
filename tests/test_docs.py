"""README.md and the pages in docs/ are run or compared, so that they stay true.

Every number in them comes from a .json file of docs/ or from docs/paper/, every command
parses, every flag, file, link and name exists.
"""
import ast
import csv
import importlib
import json
import math
import re
import runpy
import shlex
import tomllib
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

import data
import world
from conftest import ROOT
from lab import bench, doubling, remedies
from lab.compare import TITLES
from lab.paper import AI_BETA, DETAILS, EXPERIMENTS
from losses import LIKELY
from model import GPT, GPTConfig
from support import own_data, show
from support.flags import NOT_KEPT, OWN, TOY, parse_args
from support.machine import GPT2, needs, parameters

SEEDS = {0, 1, 2}
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
README = PAGES["README.md"]
CLAIMS = PAGES["docs/claims.md"]
METRICS = PAGES["docs/metrics.md"]
MINIATURE = PAGES["docs/paper-in-miniature.md"]
COMPARISON = PAGES["docs/rlhf-against-dpo.md"]
REMEDIES = PAGES["docs/why-not-plain-dpo.md"]
DIFFERENCES = PAGES["docs/differences-from-the-paper.md"]
RESULTS = json.loads((ROOT / "docs" / "results.json").read_text(encoding="utf-8"))


# ---- What was recorded, written as the pages write it

def mean_and_se(values):
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def number(values, digits=3):
    """ "1.964 ± 0.016", the mean and standard error over seeds."""
    mean, se = mean_and_se(values)
    return f"{mean:.{digits}f} ± {se:.{digits}f}"


def percent(values):
    """ "82.3 % ± 0.3", the same for shares."""
    mean, se = mean_and_se(values)
    return f"{100 * mean:.1f} % ± {100 * se:.1f}"


def one_percent(value):
    return f"{100 * value:.1f} %"


def flowing(text):
    """The text without its line breaks."""
    return " ".join(text.split())


def number_or_text(text):
    try:
        return float(text)
    except ValueError:
        return text


def paper(name):
    """The rows of an experiment's CSV, numbers as numbers."""
    rows = []
    with open(ROOT / "docs" / "paper" / f"{name}.csv", encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            rows.append({key: number_or_text(text) for key, text in row.items()})
    return rows


def alone():
    """rlhf.json of a run of seed 0 with nothing else on the machine."""
    return json.loads((ROOT / "docs" / "paper" / "alone.json").read_text(encoding="utf-8"))


def selected(name, **where):
    """The three rows of an experiment, one a seed, that have these values."""
    rows = [row for row in paper(name) if all(row[key] == value for key, value in where.items())]
    assert len(rows) == 3, (name, where)
    return rows


def share(name, column, **where):
    return percent([row[column] for row in selected(name, **where)])


def parts_of_optimum(name, **where):
    """J as a share of the optimum's J of the same seed, for three rows."""
    optima = selected("who-labels", row=TITLES["optimum"])
    optimal = {row["seed"]: row["objective"] for row in optima}
    return [row["objective"] / optimal[row["seed"]] for row in selected(name, **where)]


# ---- The tables

def closing_rows(runs):
    """The README's closing table, from the summaries of three seeds."""
    names = {"reference": "reference (SFT)", "plain": "plain DPO (Eq. 7 alone)",
             "dpo": "**DPO** (the default run)", "same_kl": "optimum at DPO's KL",
             "same_beta": "optimum at the same β"}
    shown = {"reward": number, "kl": number, "objective": number, "win_rate": percent,
             "wellformed": percent, "objective_all": number}
    for row, name in names.items():
        cells = [name]
        for column, written in shown.items():
            key = show.summary_key(row, column)
            cells.append(written([run[key] for run in runs]))
        yield f"| {' | '.join(cells)} |"


def test_the_closing_table_is_that_of_the_recorded_runs():
    assert len(RESULTS["default"]) == 3, "three seeds"
    for row in closing_rows(RESULTS["default"]):
        assert row in README, f"README.md lacks the row\n{row}\nIt comes from docs/results.json"


def test_the_figures_in_the_prose_are_those_of_the_recorded_runs():
    runs, text = RESULTS["default"], flowing(README)
    captured = percent([run["captured"] for run in runs])
    assert f"DPO reaches {captured} of the gain in reward that is possible at its KL" in text
    assert f"plain DPO reaches {percent([run['plain_captured'] for run in runs])}." in text
    shares = RESULTS["plain_wellformed"]
    low, high = 1 - max(shares), 1 - min(shares)
    assert len(shares) == 8 and "over eight seeds" in text
    assert f"Between {low:.0%} and {high:.0%} of what".replace("%", " %") in text
    remedies = flowing(REMEDIES)
    assert f"Over eight seeds it is {1 - high:.0%} to {1 - low:.0%}".replace("%", " %") in remedies
    seconds = sum(run["seconds"] for run in runs) / 3
    assert f"about {seconds:.0f} s on 2 CPU cores" in text


def test_a_share_of_the_gain_in_reward_is_called_so(small_run):
    """evaluate.captured compares gains over the reference, and not rewards."""
    summary = json.loads((small_run / "summary.json").read_text(encoding="utf-8"))
    gain = f"DPO reaches {summary['captured']:.1%} of the gain in reward that is possible"
    assert gain in show.toy_table(summary)
    for page, text in PAGES.items():
        assert "of the reward that is possible" not in flowing(text), page


REMEDIED = json.loads((ROOT / "docs" / "remedies.json").read_text(encoding="utf-8"))


def remedy_row(table, row):
    """A line of a table of remedies, on held-out prompts. In the table "why" the noise of the term
    and the share of the lost gain that is not lost come last."""
    found = REMEDIED[table][row]
    columns = ("gain", "wellformed", "j") + (("j_all",) if table == "beta 1" else ())
    cells = [row.replace("stray mass, 1", "**stray mass, 1** (the default)")
             if row.endswith("stray mass, 1") and "labels" not in row else row]
    cells += [percent(found["held_out"][name]) for name in columns]
    if table == "why":
        noise = mean_and_se([sd for _, sd in found["term"]])[0] if "term" in found else None
        cells.append("" if noise is None else f"{noise:.3f}")
        cells.append(f"{100 * remedies.removed(REMEDIED['why'], row):.0f} %")
    return f"| {' | '.join(cells)} |"


def test_the_tables_of_remedies_are_those_of_the_recorded_runs():
    """Every row of docs/remedies.json at beta 1 and in "why", in their order, from three seeds."""
    for rows in REMEDIED.values():
        for found in rows.values():
            assert {len(values) for side in ("train", "held_out")
                    for values in found[side].values()} == {3}
    wanted = [remedy_row(table, row) for table in ("beta 1", "why") for row in REMEDIED[table]]
    shown = re.findall(r"^\| .* % ± .*$", REMEDIES, re.MULTILINE)
    assert shown == wanted, "docs/why-not-plain-dpo.md differs from docs/remedies.json"
    assert f"with a weight of {TOY['stray_weight']:g}" in flowing(REMEDIES)
    assert f"gives less than {LIKELY:.0%}".replace("%", " %") in flowing(REMEDIES)
    assert f"there are at most {1 / LIKELY:.0f}," in flowing(REMEDIES)


def test_the_prose_about_remedies_is_that_of_the_recorded_runs():
    def on_train(row):
        values = REMEDIED["beta 1"][row]["train"]["j"]
        return f"{100 * mean_and_se(values)[0]:.1f} %"

    def gain(table, row, name="gain"):
        return percent(REMEDIED[table][row]["held_out"][name])

    text, default = flowing(REMEDIES), "stray mass, 1"
    weights = [on_train(f"stray mass, {weight}") for weight in ("0.3", "1", "3")]
    assert f"Eq. 7 alone has {on_train('nothing: plain DPO')} there" in text
    assert (f"with the weights 0.3, 1 and 3 has {weights[0]}, {weights[1]} and {weights[2]}, and "
            f"the missing mass has {on_train('missing mass, 0.15')}") in text
    assert f"3 % costs J: {on_train('stray mass, 1, below 3 %')} is left" in text
    assert (f"At β = 0.5 the default reaches {gain('beta 0.5', default)} of the gain with "
            f"{gain('beta 0.5', default, 'wellformed')} well-formed") in text
    assert (f"gain is {gain('why', 'missing mass, exact')} at β = 0.25, and with the estimate it "
            f"is {gain('why', 'missing mass, 0.15')}:") in flowing(MINIATURE)
    exact = mean_and_se(REMEDIED["why"]["exact labels, nothing added"]["held_out"]["gain"])[0]
    assert f"with exact labels it gains {100 * exact:.1f} %, and still leaks" in text
    for sentence in ("exact", "the grammar's probabilities", "exact, biased", "new responses",
                     "new responses, biased"):
        row = f"missing mass, {sentence}"
        if row in REMEDIED["why"]:
            share = f"{100 * remedies.removed(REMEDIED['why'], row):.0f} %"
            assert share in text, row


def test_the_default_runs_of_both_records_are_the_same():
    """docs/remedies.json takes two policies from the runs that docs/results.json summarises."""
    for row, keys in (("stray mass, 1", ("captured", "policy_wellformed")),
                      ("nothing: plain DPO", ("plain_captured", "plain_wellformed"))):
        for name, key in zip(("gain", "wellformed"), keys):
            assert REMEDIED["beta 1"][row]["held_out"][name] == pytest.approx(
                [run[key] for run in RESULTS["default"]], abs=1e-6)


def test_the_table_of_what_leaks_is_that_of_the_recorded_runs():
    """Every row of docs/leak.json, a number for each of three runs; the rows of the page in its
    order are looked up by their numbers."""
    recorded = json.loads((ROOT / "docs" / "leak.json").read_text(encoding="utf-8"))
    rows = set()
    for found in recorded.values():
        cells = [", ".join(f"{100 * value:.1f}" for value in found[key])
                 for key in ("wellformed", "share_of_j")]
        assert len(found["wellformed"]) == 3, "three seeds"
        rows.add(" | ".join(cells))
    shown = re.findall(r"^\| [^|]* \| (-?\d+\.\d, .* \| -?\d+\.\d, .*) \|$", REMEDIES, re.MULTILINE)
    assert len(shown) == len(set(shown)) >= 17 and set(shown) <= rows


def test_the_shares_of_the_leak_are_those_of_the_recorded_runs():
    """Of the mass that one prompt's plain DPO loses, and a table of free logits does not lose: how
    much a transformer keeps that shares less."""
    recorded = json.loads((ROOT / "docs" / "leak.json").read_text(encoding="utf-8"))

    def wellformed(name):
        return torch.tensor(recorded[name]["wellformed"])

    def prevented(name):
        plain = wellformed("one prompt")
        return (wellformed(name) - plain) / (wellformed("a table, no logits") - plain)

    own = "one prompt, not very has its own "
    single = torch.cat([prevented(own + part) for part in ("attention", "MLP", "head")])
    text = flowing(REMEDIES)
    assert f"prevents {100 * single.min():.0f} % to {100 * single.max():.0f} % of the leak" in text
    assert prevented(own + "attention, MLP, head").mean() < prevented(own + "MLP").mean() + 0.01
    name = "one prompt, each modifier has its own MLP, head"
    each = prevented(name)
    assert f"prevents {100 * each.min():.0f} % to {100 * each.max():.0f} % of the leak" in text
    assert wellformed(name).max() - wellformed(name).min() < 0.02


def comparison_rows():
    """The table of RLHF against DPO, from docs/paper/who-labels.csv, with the seconds alone."""
    seconds = alone()["rows"]
    for name, title in TITLES.items():
        rows = selected("who-labels", row=title)
        samples = f"{rows[0]['generated']:,.0f}"
        if title.startswith("best"):
            samples += " an answer"
        cells = [title.replace("pi*", "π\\*"), f"{rows[0]['labels']:,.0f}", samples,
                 f"{rows[0]['models']:.0f}", f"{seconds[name]['seconds']:.0f}"]
        for column in ("reward", "kl"):
            cells.append(number([row[column] for row in rows], digits=2))
        for column in ("share", "wellformed"):
            cells.append(percent([row[column] for row in rows]))
        yield f"| {' | '.join(cells)} |"


def test_the_comparison_is_that_of_the_recorded_runs():
    for row in comparison_rows():
        assert row in COMPARISON, f"the page lacks the row\n{row}\nIt is in who-labels.csv"


def test_the_recorded_runs_were_made_with_todays_defaults():
    for run in RESULTS["default"]:
        flags = vars(parse_args(["--seed", str(run["flags"]["seed"])]))
        assert run["flags"] == {name: flags[name] for name in flags if name not in NOT_KEPT}


# ---- The paper in miniature: the numbers in its sentences

def figures_of_fig2_left():
    def part(method, setting):
        return share("fig2-left", "share_of_frontier", method=method, setting=setting)

    dpo, ppo = "DPO", "PPO, learned reward"
    yield (f"DPO reaches {part(dpo, 'beta 2')} of the possible gain at β = 2 "
           f"and {part(dpo, 'beta 1')} at β = 1")
    yield f"PPO on the learned reward reaches {part(ppo, 'target KL 0.6')} at a target of 0.6 nats"
    yield f"{part(dpo, 'beta 0.5')} at β = 0.5, and {part(dpo, 'beta 0.25')} at β = 0.25"
    yield f"PPO on the learned reward keeps {part(ppo, 'target KL 2.5')} at 2.5 nats"
    yield f"best of 256 keeps {part('best of N, learned reward', 'N 256')}"
    plain = {"method": "DPO, Eq. 7 alone", "setting": "beta 0.5"}
    yield (f"Eq. 7 alone reaches {part(*plain.values())} at β = 0.5 "
           f"and {part(plain['method'], 'beta 0.25')} at β = 0.25")
    yield f"At β = 0.5 it is {share('fig2-left', 'wellformed', **plain)} of its text"
    rows = selected("fig2-left", **plain | {"setting": "beta 0.25"})
    none, *some = sorted(row["wellformed"] for row in rows)
    assert none < 1e-6, "the page tells of one run without a review"
    yield (f"At β = 0.25 it is {' and '.join(map(one_percent, some))} in two runs, "
           "and nothing in the third")


def figures_of_fig2_right():
    def wins(method, temperature):
        return share("fig2-right", "win_rate", method=method, temperature=temperature)

    ppo = "PPO, learned reward"
    yield (f"DPO wins {wins('DPO', 0)} at temperature 0 and {wins('DPO', 1)} at 1, "
           f"and PPO wins {wins(ppo, 0)} and {wins(ppo, 1)}")


def figures_of_fig3():
    def wins(method):
        return share("fig3", "win_rate", method=method, step="")

    yield (f"base {wins('base')}, Preferred-FT {wins('Preferred-FT')}, DPO {wins('DPO')}, "
           f"best of 128 {wins('best of 128 by r*')}")


def figures_of_table1():
    def wins(method, prompts):
        return share("table1", "win_rate", method=method, prompts=prompts)

    ppo = "PPO, learned reward"
    yield (f"DPO {wins('DPO', 'trained')} and {wins('DPO', 'held out')}, "
           f"PPO {wins(ppo, 'trained')} and {wins(ppo, 'held out')}")


def figures_of_fig4():
    def wins(judge, n):
        return share("fig4", "win_rate", judge=judge, N=n)

    yield (f"Ranked by r\\*, the win rate is {wins('r*', 16)} at N = 16 "
           f"and {wins('r*', 128)} at N = 128")
    yield (f"Ranked by the learned reward, it is {wins('learned reward', 16)} "
           f"and {wins('learned reward', 128)}")


def figures_of_labels_and_samples():
    def part(method, **where):
        return percent(parts_of_optimum("labels-and-samples", method=method, **where))

    rows = selected("labels-and-samples", method="RLHF", labels=2500)
    parts = parts_of_optimum("labels-and-samples", method="RLHF", labels=2500)
    stayed = [one_percent(part) for row, part in zip(rows, parts) if row["wellformed"] > 0.5]
    assert len(stayed) == 2, "the page tells of one run that fell apart"
    yield f"From 2,500 labels DPO gets {part('DPO', labels=2500)} of J\\*"
    yield f"RLHF gets {' and '.join(sorted(stayed))} in two runs. In the third run PPO falls apart"
    yield (f"From 20,000 labels DPO gets {part('DPO', labels=20000)} "
           f"and RLHF gets {part('RLHF', labels=20000)}")
    many = "RLHF, 40,000 labels"
    yield (f"{part(many, generated=2560)} of J\\* with 2,560 samples "
           f"to {part(many, generated=40960)} with 40,960")


def figures_of_over_optimisation():
    rows = paper("over-optimisation")
    steps, last = {}, {}  # PPO's rows by samples generated, and the last row of each seed
    for row in rows:
        if row["method"].startswith("PPO"):
            steps.setdefault(row["setting"], []).append(row)
            last[row["seed"]] = row
    hacked = sorted(row["learned"] for row in last.values() if row["wellformed"] < 0.5)
    count = ["No run", "One run", "Two runs", "All runs"][len(hacked)]
    best = []
    for seed in sorted(SEEDS):
        tilted = [row for row in rows if row["method"] == "tilted" and row["seed"] == seed]
        best.append(max(row["learned"] for row in tilted))
    yield f"{count} of three end in text that is no review"
    yield (f"scores this text {' and '.join(f'{score:.1f}' for score in hacked)}, "
           f"and its favourite reviews get about {sum(best) / 3:.1f}")
    top = max(steps.values(), key=lambda rows: sum(row["reward_all"] for row in rows))
    yield (f"turns at {top[0]['setting']:,.0f} samples, "
           f"at a KL of {sum(row['kl'] for row in top) / 3:.1f} nats")
    for seed in sorted(SEEDS):
        yield f"*{last[seed]['sample'].strip()}*"


def figures_of_ppo_details():
    sentences = {"as it is": "As it is, it reaches",
                 "no learning rate annealing": "Without annealing the learning rate it reaches",
                 "no gradient clipping": "without gradient clipping",
                 "no critic: REINFORCE++": "without the critic",
                 "no ratio clip": "Without the clip of the ratio it reaches"}
    assert sentences.keys() <= DETAILS.keys()
    for detail, words in sentences.items():
        yield f"{words} {share('ppo-details', 'share', detail=detail)}"


MINIATURES = {"fig2-left": figures_of_fig2_left, "fig2-right": figures_of_fig2_right,
              "fig3": figures_of_fig3, "table1": figures_of_table1, "fig4": figures_of_fig4,
              "labels-and-samples": figures_of_labels_and_samples,
              "over-optimisation": figures_of_over_optimisation,
              "ppo-details": figures_of_ppo_details}


@pytest.mark.parametrize("name", MINIATURES)
def test_the_figures_in_the_gallery_are_those_of_the_recorded_runs(name):
    for sentence in MINIATURES[name]():
        assert sentence in flowing(MINIATURE), f"docs/paper-in-miniature.md lacks: {sentence}"


def test_the_figures_about_judges_are_those_of_the_recorded_runs():
    text, quality = flowing(COMPARISON), alone()["reward_models"]["human"]
    judge = share("who-labels", "share", row=TITLES["optimum-judge"])
    assert f"Even the best policy for this judge reaches only {judge} of the optimal J" in text
    assert (f"ranks {one_percent(quality['accuracy'])} of fresh labels rightly, "
            f"where {one_percent(quality['ceiling'])} is the ceiling") in text


def test_the_tables_of_each_judge_at_its_best_beta_are_those_of_the_recorded_runs():
    def part(row):
        return share("who-labels", "share", row=row)

    judges = {"the AI judge": 'the AI judge: 0.6 r\\* + 0.4 "very"',
              "0.6 r*": "0.6 r\\*: the scale alone",
              "r* + 0.4 very": 'r\\* + 0.4 "very": the taste alone'}
    for judge, words in judges.items():
        best = f"optimum for {judge}, its best beta"
        beta = selected("who-labels", row=best)[0]["beta"]
        row = f"| for {words} | {part(f'optimum for {judge}')} | {part(best)} | {beta:.2f} |"
        assert row in COMPARISON, f"the page lacks the row\n{row}\nIt is in who-labels.csv"
    for name in ("ppo-ai", "ppo-judge", "dpo-ai"):
        title = TITLES[name]
        row = f"| {title} | {part(title)} | {part(f'{title}, beta {AI_BETA:g}')} |"
        assert row in COMPARISON, f"the page lacks the row\n{row}\nIt is in who-labels.csv"


def test_every_experiment_is_recorded_for_three_seeds_and_shown():
    assert set(MINIATURES) | {"who-labels"} == set(EXPERIMENTS), "an experiment has no sentences"
    for name in EXPERIMENTS:
        assert {row["seed"] for row in paper(name)} == SEEDS, name
        assert f"(paper/{name}.png)" in MINIATURE, f"the gallery lacks the figure of {name}"
        assert f"(paper/{name}.csv)" in MINIATURE, f"the gallery lacks the data of {name}"


# ---- Numbers about the project itself

def test_the_world_is_as_large_as_the_pages_say():
    text = flowing(README)
    assert f"{len(world.responses()):,} well-formed responses" in text
    assert len(world.prompts()[1]) == 8 and "eight held-out prompts" in text
    assert f"at its reward of −{-world.ILL_FORMED_REWARD:g}" in text
    assert f"at its reward of −{-world.ILL_FORMED_REWARD:g}" in flowing(REMEDIES)
    assert f"the reward −{-world.ILL_FORMED_REWARD:g}" in METRICS


def test_the_differences_from_the_paper_are_todays_defaults():
    lr, batch_size = re.search(r"AdamW, lr (\S+), batch (\d+) ", DIFFERENCES).groups()
    assert (float(lr), int(batch_size)) == (TOY["lr"], TOY["batch_size"])
    assert f"| β = {TOY['beta']:g} |" in DIFFERENCES
    assert f"Eq. 7 + {TOY['stray_weight']:g} × stray mass" in DIFFERENCES
    assert OWN["stray_weight"] == 0
    assert f"is Eq. 7 alone with β = {OWN['beta']:g}" in flowing(DIFFERENCES)
    config = GPTConfig(block_size=64, vocab_size=data.get_tokenizer("toy").n_vocab,
                       n_layer=TOY["n_layer"], n_head=TOY["n_embd"] // 32, n_embd=TOY["n_embd"])
    size = sum(p.numel() for p in GPT(config).parameters())
    assert f"{round(size, -4):,} parameters, {TOY['n_layer']} layer" in DIFFERENCES


def test_as_many_bugs_as_the_readme_says():
    bugs = tomllib.loads((ROOT / "exercises" / "bugs.toml").read_text(encoding="utf-8"))["bug"]
    assert f"the notebooks and {len(bugs)} bugs" in flowing(README)


# ---- Commands, flags, modules

def commands(text):
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            line = line.split("#")[0].strip()
            if line:
                yield line


def all_commands():
    found = []
    for text in PAGES.values():
        found.extend(commands(text))
    return found


def test_the_two_commands_stand_in_the_readme():
    test_command = "pip install -r requirements.txt && python -m pytest"
    continuous = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -r requirements.txt && python train.py" in commands(README)
    assert test_command in commands(README)
    assert test_command in continuous
    assert "`ruff check`" in README and "ruff check" in continuous


def test_the_quick_tests_are_chosen_by_file():
    """A file is slow as a whole, by a line of its own. So no test is left out by accident of its
    name. The README says how many files are left out."""
    slow = 0
    for file in (ROOT / "tests").glob("test_*.py"):
        marks = re.findall(r"^.*mark\.slow$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert marks in ([], ["pytestmark = pytest.mark.slow"]), file.name
        slow += len(marks)
    assert 'python -m pytest -m "not slow"' in commands(README)
    number = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight",
              "nine"][slow]
    assert f"leave out {number} slow files" in flowing(README)


def test_every_train_command_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    flags_of_commands = []
    for command in all_commands():
        if "train.py" in command and "--help" not in command:
            flags_of_commands.append(shlex.split(command.split("train.py", 1)[1]))
    assert len(flags_of_commands) >= 4
    for flags in flags_of_commands:
        parse_args(flags)


def test_every_experiment_named_by_a_command_exists():
    named = []
    for command in all_commands():
        named.extend(re.findall(r"python -m lab\.paper (\S+)", command))
    assert named and set(named) <= {"all", "--help", *EXPERIMENTS}


def test_every_flag_that_is_named_exists(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    others = [ROOT / "conftest.py", ROOT / "evaluate.py", ROOT / "rlhf.py",
              *(ROOT / "exercises").glob("*.py"), *(ROOT / "lab").glob("*.py")]
    for file in others:
        source = file.read_text(encoding="utf-8")
        known |= set(re.findall(r'add(?:option|_argument)\(\s*"(--[a-z-]+)"', source))
    for page, text in PAGES.items():
        unknown = set(re.findall(r"`(--[a-z][a-z-]*)", text)) - known
        assert not unknown, f"{page} names flags that do not exist: {unknown}"


def test_the_message_about_bad_rows_is_the_real_one(tmp_path, monkeypatch):
    """For a file of 2,312 dialogues of which four cannot be used."""
    monkeypatch.chdir(tmp_path)
    dialogues = []
    for i in range(1, 2313):
        chosen = " " if i in (87, 640, 1203) else " Yes."
        start = f"\n\nHuman: {i}?\n\nAssistant:"
        dialogues.append(json.dumps({"chosen": start + chosen, "rejected": start + " No."}))
    dialogues[2000] = '{"chosen": "a" ...'
    (tmp_path / "hh.jsonl").write_text("\n".join(dialogues), encoding="utf-8")
    with pytest.raises(data.DataError) as error:
        data.load_preferences("hh.jsonl")
    page = (ROOT / "docs" / "your-own-pairs.md").read_text(encoding="utf-8")
    assert f"```text\n{error.value}\n```" in page, str(error.value)


def test_the_gradient_check_runs_as_the_readme_says(capsys):
    """python dpo.py. test_exercises.py runs the exercises' commands, .ci/run a newcomer's two."""
    assert any(command.startswith("python dpo.py") for command in commands(README))
    try:
        runpy.run_path(str(ROOT / "dpo.py"), run_name="__main__")
    finally:
        torch.set_default_dtype(torch.float32)
    printed = capsys.readouterr().out
    assert "log pi(y_w|x)" in printed and "WRONG" not in printed.split("Columns:")[0]


def test_every_module_named_by_a_command_exists():
    for command in all_commands():
        for module in re.findall(r"python -m ([\w.]+)", command):
            file = ROOT / (module.replace(".", "/") + ".py")
            assert module == "pytest" or file.exists(), command
        for file in re.findall(r"python ([\w/]+\.py)", command):
            assert (ROOT / file).exists(), command
        for file in re.findall(r"(?:--impl |tests/)[\w./]+", command):
            assert (ROOT / file.removeprefix("--impl ")).exists(), command


# ---- Names, files, links

@lru_cache(maxsize=None)
def functions_of_tests():
    """[(file, function), ...]: every function of tests/test_*.py, as syntax."""
    found = []
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found.append((file, node))
    return found


def claims_of_tests():
    """{claim: {(file, test), ...}}, from the docstrings, which begin with "Claim 7"."""
    found = {}
    for file, function in functions_of_tests():
        match = re.match(r"Claim (\d+)\b", ast.get_docstring(function) or "")
        if match:
            test = (f"tests/{file.name}", function.name)
            found.setdefault(int(match[1]), set()).add(test)
    return found


def test_the_table_of_claims_is_that_of_the_tests():
    """Each claim has a row. The row names every test whose docstring claims it, and no other."""
    proofs = claims_of_tests()
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.*?) \| (.*?) \|$", CLAIMS, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, len(proofs) + 1))
    assert len(rows) >= 46
    for number, _, cell, _, notebook in rows:
        links = re.findall(r"\[`(\w+)`\]\(\.\./([\w./]+)\)", cell)
        named = {(file, test) for test, file in links}
        assert named == proofs.get(int(number), set()), f"claim {number}"
        assert named, f"claim {number} has no proof"
        for n in notebook.split(", "):
            there = list((ROOT / "notebooks").glob(f"{n.strip('[')[:2]}_*.ipynb"))
            assert there, f"claim {number}: there is no notebook {n}"
            wanted = f"[{n[1:3]}](../notebooks/{there[0].name})"
            assert n == wanted, f"claim {number}: notebook {n}"


def test_every_notebook_is_in_the_course():
    course = README.split("## The notebooks")[1].split("## Write it yourself")[0]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        entry = rf"^- \[.*\]\(notebooks/{re.escape(path.name)}\):"
        assert re.search(entry, course, re.MULTILINE), f"{path.name} is not in the course"


def test_every_metric_that_is_logged_is_in_the_glossary(small_run):
    logged = set()
    for line in (small_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        logged |= json.loads(line).keys()
    missing = {key for key in logged - {"stage", "step"} if f"`{key}`" not in METRICS}
    assert not missing, f"the glossary in docs/metrics.md lacks {missing}"


def test_every_key_of_the_summary_is_in_the_glossary(small_run):
    summary = json.loads((small_run / "summary.json").read_text(encoding="utf-8"))
    section = METRICS.split("## `summary.json` of a toy run")[1].split("\n## ")[0]
    missing = {key for key in summary if f"`{key}`" not in section}
    assert not missing, f"the glossary in docs/metrics.md lacks {missing}"
    unknown = set(re.findall(r"`(\w+)`", section)) - summary.keys()
    assert not unknown, f"docs/metrics.md explains keys that are not in the summary: {unknown}"


def test_every_key_of_a_summary_of_own_data_is_in_the_glossary():
    section = METRICS.split("## `summary.json` with your own pairs")[1]
    missing = {key for key in own_data.ROWS if f"| `{key}` |" not in section}
    assert not missing, f"the glossary in docs/metrics.md lacks {missing}"
    assert "`held_out_pairs`" in section


def without_blocks(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def without_code(text):
    """A page without its code: blocks and `words`."""
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[page])):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}, which is not there"
        if anchor:
            there = anchors(target.read_text(encoding="utf-8"))
            assert anchor in there, f"{page} links to {link}, which has no such heading"


def test_every_module_and_every_page_is_in_the_readme():
    for module in set(ROOT.glob("*.py")) - {ROOT / "conftest.py"}:
        link = f"[`{module.name}`]({module.name})"
        assert link in README, f"{module.name} is not in the table of files"
    for folder in ("support", "lab", "tests", "notebooks", "exercises", "docs"):
        assert f"[`{folder}/`]({folder})" in README, f"{folder}/ is not in the table of files"
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in README, f"README.md does not link to docs/{page.name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_name_in_code_exists(page):
    """`module.name` is in the module. `test_...` is a test or the beginning of a file's name."""
    tests = [function.name for _, function in functions_of_tests()]
    files = [file.name for file in (ROOT / "tests").glob("test_*.py")]
    for word in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert word in tests or any(file.startswith(word) for file in files), f"{page}: {word}"
    for module, name in re.findall(r"`((?:\w+\.)?\w+)\.(\w+)`", PAGES[page]):
        file = ROOT / (module.replace(".", "/") + ".py")
        if file.exists() and name not in ("py", "json", "jsonl", "png", "pt"):
            there = hasattr(importlib.import_module(module), name)
            assert there, f"{page} names {module}.{name}, which does not exist"


def test_requirements_are_pinned_and_explained():
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _ = line.split("==")
            assert f"`{name}`" in README, f"the README does not say why {name} is needed"


# ---- The size of the pages

def test_the_readme_is_short():
    assert len(README.encode("utf-8")) <= 14_000
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_longer_than_100_columns(page):
    """Rows of tables, and lines that are one link, cannot be broken."""
    for n, line in enumerate(PAGES[page].splitlines(), 1):
        one_link = re.fullmatch(r"\s*(?:[-*] )?!?\[[^\]]*\]\(\S+\)[.,:;]?", line)
        unbreakable = line.startswith("|") or one_link
        assert len(line) <= 100 or unbreakable, f"{page}, line {n}: {len(line)} columns"


# ---- How fast it is, and what GPT-2 needs

SPEED = PAGES["docs/speed.md"]


def test_the_speeds_are_those_that_were_measured():
    """A row for each shape, made of docs/speed.json: medians, and the largest difference of a loss
    over the fewest steps that were compared."""
    recorded = json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8"))
    assert list(recorded["results"]) == list(bench.SHAPES) and recorded["threads"] == 2
    for name, result in recorded["results"].items():
        ours, comes, best = result["dpo"].values()
        cells = [name, *(f"{side['per_second'][1]:.3g}" for side in (ours, comes, best)),
                 *(f"{side['times_as_fast_here'][1]:.2f}" for side in (comes, best)),
                 f"{ours['share_of_peak'][1]:.0%}",
                 *(f"{side['peak_memory'] / 1e9:.2f}" for side in (ours, best)),
                 f"{max(side['loss_difference'] for side in (comes, best)):.0e} "
                 f"({min(side['losses_compared'] for side in (comes, best))})"]
        assert f"| {' | '.join(cells)} |" in SPEED
        sizes = [f"{size:,}" for size in recorded["sizes"][name].values()]
        assert f"| {name} | {' | '.join(sizes)} |" in SPEED
        if name in ("toy", "small"):
            here, there = result["generate"].values()
            cells = [name, *(f"{side['per_second'][1]:.3g}" for side in (here, there)),
                     f"{there['times_as_fast_here'][1]:.2f}", f"{here['share_of_peak'][1]:.0%}"]
            assert f"| {' | '.join(cells)} |" in SPEED


def test_the_costs_of_larger_sizes_are_those_that_were_measured():
    """A row for each point of docs/doubling.json: the median cost, and the operations."""
    recorded = json.loads((ROOT / "docs" / "doubling.json").read_text(encoding="utf-8"))
    assert recorded["base"] == doubling.BASE and recorded["threads"] == 2
    for size, name in (("pairs", "pairs"), ("response", "tokens a response"),
                       ("n_embd", "channels")):
        points = recorded["costs"][size]
        for title, values in (
                (name, [f"{point['size']}" for point in points]),
                ("time of a step", [f"{point['cost'][1]:.2f}" for point in points]),
                ("operations", [f"{point['operations']:.2f}" for point in points])):
            assert f"| {title} | {' | '.join(values)} |" in SPEED


@pytest.mark.parametrize("name", GPT2)
def test_the_plan_for_gpt2_follows_from_the_estimates(name):
    """The memory that train.py expects of a batch of 1 and of 16 pairs with 512 tokens. The hours
    of two epochs of DPO (three passes over a pair, each beginning once), of one pass of the
    reference, and of two epochs of SFT on the chosen responses."""
    n_layer, n_embd = GPT2[name]

    def gigabytes(pairs, recompute):
        return needs(SimpleNamespace(
            data="mine.jsonl", init=name, tokenizer="gpt2", max_length=512, batch_size=pairs,
            accumulate=1, dtype="bfloat16", recompute=recompute, n_layer=0, n_embd=0))[0] / 1e9

    shape = {"n_layer": n_layer, "n_embd": n_embd, "vocab": 50_257, "prompt": 256, "response": 256}
    seen = sum(range(1, 512))  # a token sees itself and those before it; the last one is not read
    sft = 3 * bench.flops(shape, tokens=511, scored=256, seen=seen)
    dpo = bench.useful_flops(shape, "dpo")
    hours = 60_000 * (2 * dpo + dpo / 3 + 2 * sft) / 1e13 / 3600
    size, memory = parameters(n_layer, n_embd, 50_257, 1024) / 1e6, gigabytes(1, False)
    fits = ["yes" if memory < card else "no" for card in (12, 24)]
    assert (f"| {name} | {size:,.0f} million | {memory:.1f} | {fits[0]} | {fits[1]} | {hours:.1f} "
            f"| {hours / 4:.1f} |") in SPEED
    assert f"| {name} | {gigabytes(16, False):.1f} | {gigabytes(16, True):.1f} |" in SPEED
