"""evaluate.py: a whole summary, once more by plain sums over all responses."""
import math
import sys
from functools import lru_cache

import pytest
import torch

import evaluate
import support.figures
import world
from support import show
from support.files import read_json, write_json
from tools import assert_same

BETA = 0.7
HELD_OUT = world.prompts()[1]
REWARDS = [[world.true_reward(x, y) for y in world.responses()] for x in HELD_OUT]
LOW = -5.0  # the reward of ill-formed text


@lru_cache(maxsize=None)  # of 8 prompts: not before a test asks for them
def wins_of(prompt):
    """Entry [i, j] says how often i wins against j: always, never, or, in a tie, half the time."""
    x = torch.tensor([*REWARDS[prompt], LOW], dtype=torch.float64).round(decimals=9)  # (N,)
    return ((x[:, None] > x[None, :]) + 0.5 * (x[:, None] == x[None, :])).double()  # (N, N)


@pytest.fixture(scope="module")
def tables():
    """{name: log-probabilities (P,N)} of a reference and two policies. Each keeps another share
    of its text well-formed."""
    grammar = world.grammar_logps(HELD_OUT)
    reward = torch.tensor(REWARDS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, tilt, share in (("sft", 0.0, 0.95), ("plain", 0.9, 0.6), ("dpo", 0.8, 0.97)):
        noise = torch.randn(grammar.shape, generator=generator, dtype=torch.float64)
        logps = torch.log_softmax(grammar + tilt * reward + 0.3 * noise, -1)
        shares = share + 0.02 * torch.rand(len(HELD_OUT), 1, generator=generator).double()
        found[name] = logps + shares.log()
    return found


def mean(values):
    return math.fsum(values) / len(values)


def row_by_hand(logps, ref_logps):
    """What the table says of a policy: means over prompts, from lists of probabilities."""
    rows = []
    for prompt, r in enumerate(REWARDS):
        p, q = logps[prompt].exp().tolist(), ref_logps[prompt].exp().tolist()
        mass_p, mass_q = math.fsum(p), math.fsum(q)
        reward = math.fsum(a * c for a, c in zip(p, r)) / mass_p
        kl = math.fsum(a / mass_p * math.log(a / mass_p / (b / mass_q)) for a, b in zip(p, q))
        # with ill-formed text as one more outcome
        p, q, r = p + [1 - mass_p], q + [1 - mass_q], r + [LOW]
        reward_all = math.fsum(a * c for a, c in zip(p, r))
        kl_all = math.fsum(a * math.log(a / b) for a, b in zip(p, q) if a > 1e-9)
        p, q = torch.tensor(p).double(), torch.tensor(q).double()
        rows.append({"reward": reward, "kl": kl, "objective": reward - BETA * kl,
                     "wellformed": mass_p, "objective_all": reward_all - BETA * kl_all,
                     "win_rate": (p @ wins_of(prompt) @ q).item()})
    return {name: mean([row[name] for row in rows]) for name in rows[0]}


def optimum_by_hand(ref_logps, beta):
    """log pi* (P,N), Eq. 4, for the reference's well-formed text."""
    rows = []
    for q, r in zip(ref_logps.exp().tolist(), REWARDS):
        weights = [b * math.exp(c / beta) for b, c in zip(q, r)]
        z = math.fsum(weights)
        rows.append([math.log(w / z) for w in weights])
    return torch.tensor(rows, dtype=torch.float64)


def test_a_whole_summary_by_plain_sums(tables, monkeypatch):
    """Every number of a toy run's summary, to 1e-7: the five rows of the table, the best policy
    at DPO's KL, the shares of its gain, the highest J over all text, the distance of reference and
    grammar, and the ceiling of the accuracy."""
    monkeypatch.setattr(evaluate, "exact_logps", lambda name, prompts: tables[name])
    summary = evaluate.toy_summary({name: name for name in tables}, BETA, "ai")
    ref, want = tables["sft"], {"beta": BETA}

    rows = {"reference": row_by_hand(ref, ref), "plain": row_by_hand(tables["plain"], ref),
            "dpo": row_by_hand(tables["dpo"], ref)}
    rows["same_beta"] = row_by_hand(optimum_by_hand(ref, BETA), ref)
    # the beta at DPO's KL is not derived again: its optimum must have DPO's KL
    rows["same_kl"] = row_by_hand(optimum_by_hand(ref, summary["optimal_beta_same_kl"]), ref)
    assert rows["same_kl"]["kl"] == pytest.approx(rows["dpo"]["kl"], abs=1e-7)
    for row, columns in rows.items():
        for column, value in columns.items():
            want[show.summary_key(row, column)] = value

    start = rows["reference"]["reward"]
    gain = rows["same_kl"]["reward"] - start
    want["captured"] = (rows["dpo"]["reward"] - start) / gain
    plain_beta = evaluate.captured(evaluate.measure(tables["plain"], ref, BETA), ref)[0]
    best = row_by_hand(optimum_by_hand(ref, plain_beta), ref)
    assert best["kl"] == pytest.approx(rows["plain"]["kl"], abs=1e-7)
    want["plain_captured"] = (rows["plain"]["reward"] - start) / (best["reward"] - start)

    values, distances, ceilings = [], [], []
    for q, r in zip(ref.exp().tolist(), REWARDS):
        z = math.fsum(b * math.exp(c / BETA) for b, c in zip(q, r))
        values.append(BETA * math.log(z + (1 - math.fsum(q)) * math.exp(LOW / BETA)))
    want["objective_all_optimal"] = mean(values)
    for g, q in zip(world.grammar_logps(HELD_OUT).exp().tolist(), ref.exp().tolist()):
        distances.append(math.fsum(a * math.log(a / b) for a, b in zip(g, q)))
    want["ref_kl_from_grammar"] = mean(distances)
    for x, g in zip(world.prompts()[0], world.grammar_logps(world.prompts()[0]).exp()):
        s = torch.tensor([world.ai_score(x, y) for y in world.responses()], dtype=torch.float64)
        agrees = torch.sigmoid((s[:, None] - s[None, :]).abs())  # the label follows the score
        ceilings.append((g @ agrees @ g).item())
    want["label_ceiling"] = mean(ceilings)

    assert summary.keys() == want.keys() | {"optimal_beta_same_kl"}
    for name, value in want.items():
        assert_same(summary[name], value, 1e-7, what=name)
    without = evaluate.toy_summary({"sft": "sft", "dpo": "dpo"}, BETA, "ai")
    assert without == {name: value for name, value in summary.items() if "plain" not in name}


def test_a_share_of_no_gain_is_no_number(tables):
    """A policy that stays at the reference has a KL of 0. There is nothing to gain, and the share
    is nan."""
    ref = tables["sft"]
    _, best, share = evaluate.captured(evaluate.measure(ref, ref, BETA), ref)
    assert math.isnan(share)
    assert best == pytest.approx(row_by_hand(ref, ref)["reward"], abs=1e-5)


def test_other_rewards_can_be_measured(tables):
    """measure(..., r): the same policy with every reward doubled has twice the reward and the
    same KL (1e-12)."""
    p, ref, r = tables["dpo"], tables["sft"], torch.tensor(REWARDS, dtype=torch.float64)
    usual, doubled = evaluate.measure(p, ref, BETA), evaluate.measure(p, ref, BETA, 2 * r)
    assert doubled["reward"] == pytest.approx(2 * usual["reward"], abs=1e-12)
    assert doubled["kl"] == usual["kl"]


# ---- The command

@pytest.fixture
def printed(monkeypatch):
    """Answers are not sampled: a list of (models, prompt, how many) says what would be."""
    found = []

    def note(models, tokenizer, prompt, n=3):
        found.append((models, prompt, n, torch.rand(1).item()))
    monkeypatch.setattr(evaluate.show, "answers", note)
    return found


def test_a_report_of_a_toy_run(printed, tables, monkeypatch, capsys):
    """The table, three answers of each model to every third held-out prompt, and the summary with
    the flags. The seed of the run decides the samples."""
    flags = {"data": None, "seed": 7, "beta": BETA, "annotator": "ai"}
    models = {name: name for name in tables}
    monkeypatch.setattr(evaluate, "load_run", lambda folder, device: (flags, None, models))
    monkeypatch.setattr(evaluate, "exact_logps", lambda name, prompts: tables[name])
    summary = evaluate.report("DIR")
    assert summary == evaluate.toy_summary(models, BETA, "ai") | {"flags": flags}
    out = capsys.readouterr().out
    assert show.toy_table(summary) in out
    assert "python evaluate.py DIR --prompt TEXT" in out
    torch.manual_seed(7)
    assert printed == [(models, prompt, 3, torch.rand(1).item()) for prompt in HELD_OUT[::3]]
    assert len(printed) == 3


def test_a_report_of_a_run_on_ones_own_pairs(printed, monkeypatch, capsys):
    """The figures of held-out pairs, and one answer of each model to the first three prompts."""
    flags, models = {"data": "mine.jsonl", "seed": 7}, {"sft": "the reference", "dpo": "a policy"}

    def measure(*args):
        assert args == ("a policy", "the reference", flags, "tokens", "cpu")
        return {"loss": (0.5, 0.1)}, ["a", "b", "c", "d"]
    monkeypatch.setattr(evaluate, "load_run", lambda folder, device: (flags, "tokens", models))
    monkeypatch.setattr(evaluate.own_data, "measure", measure)
    monkeypatch.setattr(evaluate.own_data, "table", lambda summary: f"table of {summary}")
    assert evaluate.report("DIR") == {"loss": (0.5, 0.1), "flags": flags}
    assert "table of {'loss': (0.5, 0.1)}" in capsys.readouterr().out
    assert [(prompt, n) for _, prompt, n, _ in printed] == [("a", 1), ("b", 1), ("c", 1)]


def test_the_command_writes_the_summary_and_draws(printed, tmp_path, monkeypatch):
    """It keeps the seconds of the training, and has none to keep where the run was cut off before
    it had a summary. With --prompt it answers, and writes nothing."""
    drawn = []
    monkeypatch.setattr(evaluate, "report", lambda folder: {"beta": BETA})
    monkeypatch.setattr(support.figures, "draw_run", lambda *args: drawn.append(args))
    monkeypatch.setattr(evaluate, "load_run", lambda folder: ({}, None, "the models"))
    file = tmp_path / "summary.json"

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), *args])
        evaluate.main()
    command("--prompt", "Why?")
    assert printed.pop()[:2] == ("the models", "Why?") and not drawn and not file.exists()
    command()
    assert read_json(file) == {"beta": BETA, "seconds": None}
    write_json({"seconds": 12.5, "an old number": 1}, file)
    command()
    assert read_json(file) == {"beta": BETA, "seconds": 12.5}
    assert drawn == [(tmp_path, {"beta": BETA})] * 2 and not printed


def test_every_number_of_a_summary_has_the_name_that_the_pages_give():
    """docs/metrics.md lists the names."""
    names = {("reference", "reward"): "ref_reward", ("plain", "kl"): "plain_kl",
             ("dpo", "reward"): "policy_reward", ("dpo", "objective"): "objective",
             ("dpo", "objective_all"): "objective_all", ("dpo", "win_rate"): "win_rate",
             ("same_kl", "kl"): "optimal_kl_same_kl",
             ("same_beta", "reward"): "optimal_reward_same_beta",
             ("same_beta", "objective"): "objective_optimal"}
    for (row, column), name in names.items():
        assert show.summary_key(row, column) == name
