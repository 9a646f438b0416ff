"""lab/remedies.py: what it measures is what plain sums give, and each objective is what its name
says."""
import math

import pytest
import torch

import data
import evaluate
import world
from conftest import ROOT
from lab import remedies
from losses import LIKELY
from model import GPT, GPTConfig
from support.files import write_json
from support.flags import TOY
from tools import assert_same, vector

TOKENIZER = data.get_tokenizer("toy")
SETTINGS = {"epochs": 1, "batch_size": 32, "lr": 1e-3, "seed": 5, "pairs": 64}


class SmallRun:
    """What the pieces need of a finished run: a reference with random weights, and 64 pairs. Two
    steps go through them. A model of one layer is nearly uniform over the vocabulary here, so every
    second token or so is unlikely."""

    def __init__(self):
        torch.manual_seed(0)
        self.flags, self.seed, self.tokenizer = dict(SETTINGS), 5, TOKENIZER
        config = GPTConfig(64, TOKENIZER.n_vocab, n_layer=1, n_head=1, n_embd=32)
        self.reference = GPT(config).eval().requires_grad_(False)

    def new_policy(self):
        policy = GPT(self.reference.config)
        policy.load_state_dict(self.reference.state_dict())
        return policy

    def examples(self, annotator):
        return data.tokenize(data.make_preferences(64, annotator, 5), TOKENIZER)[0]


@pytest.fixture(scope="module")
def run():
    return SmallRun()


@pytest.fixture
def policies(monkeypatch):
    """`measured` gives the trained weights in the place of figures, which take seconds."""
    def weights(run, policy, beta):
        return {"weights": torch.cat([p.detach().flatten() for p in policy.parameters()])}
    monkeypatch.setattr(remedies, "measured", weights)


# ---- What is measured

def test_the_figures_are_plain_sums():
    """Two prompts, four responses, reference and policy with ill-formed mass. The oracle adds up
    one response at a time: 1e-9. Between two beta it knows the best gain at a KL from bisection."""
    beta = 0.7
    ref = [[0.4, 0.3, 0.2, 0.05], [0.1, 0.2, 0.3, 0.3]]
    pi = [[0.5, 0.1, 0.1, 0.1], [0.05, 0.1, 0.2, 0.5]]
    r = [[1.0, 0.0, -1.0, 2.0], [-1.0, 0.5, 0.0, 1.0]]

    def star(q, rewards, beta):
        weights = [a * math.exp(b / beta) for a, b in zip(q, rewards)]
        return [w / sum(weights) for w in weights]

    def given_well_formed(p):
        return [value / sum(p) for value in p]

    def with_ill_formed(p, rewards):
        return [*p, 1 - sum(p)], [*rewards, -5.0]

    def reward_and_kl(rows):
        """Means over prompts. rows: (p, q, rewards) of each."""
        reward = sum(a * b for p, _, s in rows for a, b in zip(p, s)) / len(rows)
        kl = sum(a * math.log(a / b) for p, q, _ in rows for a, b in zip(p, q)) / len(rows)
        return reward, kl

    inside = [(given_well_formed(p), given_well_formed(q), s) for p, q, s in zip(pi, ref, r)]
    everything = [(with_ill_formed(p, s)[0], *with_ill_formed(q, s)) for p, q, s in zip(pi, ref, r)]

    def j(rows, beta):
        reward, kl = reward_and_kl(rows)
        return reward - beta * kl

    def at(rows, beta):
        return [(star(q, s, beta), q, s) for _, q, s in rows]

    low, high = 1e-2, 1e2
    for _ in range(200):
        middle = (low + high) / 2
        larger = reward_and_kl(at(inside, middle))[1] > reward_and_kl(inside)[1]
        low, high = (middle, high) if larger else (low, middle)
    start = reward_and_kl([(q, q, s) for _, q, s in inside])[0]
    best = reward_and_kl(at(inside, low))[0]
    variance = sum(b * (a / b - 1) ** 2 for p, q, _ in inside for a, b in zip(p, q)) / 2
    found = remedies.figures(vector(*pi[0] + pi[1]).view(2, 4).log(),
                             vector(*ref[0] + ref[1]).view(2, 4).log(),
                             vector(*r[0] + r[1]).view(2, 4), beta)
    assert found == {
        "gain": pytest.approx((reward_and_kl(inside)[0] - start) / (best - start), abs=1e-9),
        "j": pytest.approx(j(inside, beta) / j(at(inside, beta), beta), abs=1e-9),
        "j_all": pytest.approx(j(everything, beta) / j(at(everything, beta), beta), abs=1e-9),
        "kl": pytest.approx(reward_and_kl(inside)[1], abs=1e-9),
        "wellformed": pytest.approx(sum(map(sum, pi)) / 2, abs=1e-9),
        "estimate_sd": pytest.approx(math.sqrt(variance / 128), abs=1e-9)}
    assert found["j"] < found["gain"] < 1, "the policy is not on the frontier"


def test_train_and_held_out_prompts_are_not_mixed_up(monkeypatch):
    """The rewards of both, and whose log-probabilities go with them."""
    for side, prompts in enumerate(world.prompts()):
        r, texts = remedies.rewards_of(side), world.responses()
        assert r.shape == (len(prompts), len(texts))
        assert r[3, 700].item() == world.true_reward(prompts[3], texts[700])
    monkeypatch.setattr(evaluate, "exact_logps", lambda model, prompts: (model, prompts))
    monkeypatch.setattr(remedies, "figures", lambda *args: args)
    other = SmallRun()
    other.reference = "the reference"
    for side, name in enumerate(("train", "held_out")):
        prompts = world.prompts()[side]
        assert remedies.measured(other, "a policy", 0.3)[name] == (
            ("a policy", prompts), ("the reference", prompts), remedies.rewards_of(side), 0.3)


# ---- What is added to Eq. 7

def test_the_kl_of_the_next_token_is_that_from_the_policy():
    """0.9, 0.1 against 0.5, 0.5 by hand, and 0 against itself: 1e-12."""
    p, ref = vector(0.9, 0.1)[None].log(), vector(0.5, 0.5)[None].log()
    want = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert_same(remedies.kl_at_tokens(p, ref + 3.0), vector(want), 1e-12, {  # logits: a constant
        "the arguments are swapped": vector(0.5 * math.log(1 / 1.8) + 0.5 * math.log(5)),
    }, what="the KL")  # does not count
    assert remedies.kl_at_tokens(p, p).abs().max() < 1e-12


def test_exact_labels_by_hand():
    """sigma of the difference of both true rewards, which is 0.6 + 0.6 here: 1e-6."""
    x = world.prompts()[0][0]
    good, bad = [f" superb and tender. I {verdict} it." for verdict in ("loved", "hated")]
    p = remedies.exact_labels([data.Pair(x, good, bad), data.Pair(x, bad, good)])
    assert_same(p, torch.tensor([1 / (1 + math.exp(-1.2)), 1 / (1 + math.exp(1.2))]), 1e-6,
                what="p(chosen preferred)")


def test_the_default_threshold_lets_all_of_the_grammar_pass():
    """The least likely next token of the grammar, at every beginning, for every third prompt: it is
    above the default and below 3 %. The oracle adds up responses in a dictionary."""
    responses = [TOKENIZER.encode_ordinary(y) for y in world.responses()]
    least = 1.0
    for logps in world.grammar_logps(sum(world.prompts(), [])[::3]):  # (N,)
        mass = {}
        for y, p in zip(responses, logps.exp().tolist()):
            for t in range(len(y)):
                mass[tuple(y[:t])] = mass.get(tuple(y[:t]), 0.0) + p
        least = min(least, *(p / mass[y[:-1]] for y, p in mass.items() if y))
    assert LIKELY < least < 0.03
    page = (ROOT / "docs" / "why-not-plain-dpo.md").read_text(encoding="utf-8")
    said = f"The least likely next token of the grammar has {100 * least:.1f} %"
    assert said in " ".join(page.split())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("who", ["grammar", "policy"])
def test_what_a_writer_estimates(who, biased, monkeypatch):
    """A policy that is a table, and that leaks 0.4 of its mass at every prompt. The mean of 40
    estimates is within five standard errors of 0.4, or of 1 - sum_y grammar(y) pi(y)/ref(y) where
    it has the bias of the pairs. Where the policy writes, the estimate has a tenth of the standard
    deviation that it has where the grammar writes, or less. The policy is looked at every 100
    steps. The grammar does not write the responses of the run's pairs again."""
    generator = torch.Generator().manual_seed(1)
    grammar = world.grammar_logps(world.prompts()[0])  # (P, N)
    noise = torch.randn(2, *grammar.shape, generator=generator)  # (2, P, N)
    table = world.normalise(grammar + noise[0]) + math.log(0.6)  # (P, N)
    ref = world.normalise(grammar + 0.1 * noise[1] - 0.1)  # (P, N)
    monkeypatch.setattr(remedies, "logps_of", lambda policy, tok, x, y: table[x, y].float())
    monkeypatch.setattr(evaluate, "exact_logps", lambda policy, prompts: table)
    monkeypatch.setattr(remedies, "reference_of", lambda run, side: (ref, None)[side])
    run = SmallRun()
    writer = remedies.Writer(who, run, biased)
    for step in (99, 100):
        writer.look(step, None)
        assert torch.equal(writer.logps, grammar) == (who != "policy" or step == 99)
    prompt = torch.arange(128) % 24
    values = [writer.missing_mass(None, TOKENIZER, prompt).item() for _ in range(40)]
    mean, error = remedies.mean_and_se(values)
    want = 1 - (grammar.exp() * (table - ref).exp()).sum(-1).mean().item() if biased else 0.4
    assert abs(mean - want) < 5 * error and (abs(want - 0.4) > 1e-3) == biased
    assert error < (0.0025 if who == "policy" else 0.012)
    assert error > (0.0 if who == "policy" else 0.003)
    of_the_run = torch.Generator().manual_seed(run.seed)
    assert not torch.equal(torch.rand(9, generator=of_the_run),
                           torch.rand(9, generator=remedies.Writer(who, run, False).generator))


def test_each_term_at_the_reference(run, policies, tmp_path):
    """One step of one batch with all 64 pairs. At the reference no mass is missing and the KL is 0.
    The stray mass is a plain sum over the tokens that are unlikely, and with the grammar's
    probabilities the mean of pi/grammar is one over dictionaries. Tolerance 1e-5."""
    run.flags["batch_size"], pairs = 64, data.make_preferences(64, "human", 5)
    prompts, texts = world.prompts()[0], world.responses()

    def term(name):
        return remedies.fit(run, tmp_path, beta=1.0, add=name, weight=1.0)["term"][0]

    try:
        assert term("missing mass") == pytest.approx(0, abs=1e-5)
        assert term("KL") == pytest.approx(0, abs=1e-5)
        grammar, stray, ratios = world.grammar_logps(prompts), 0.0, []
        for pair in pairs:
            for y in (pair.chosen, pair.rejected):
                x = TOKENIZER.encode_ordinary(pair.prompt)
                response = TOKENIZER.encode_ordinary(y) + [TOKENIZER.eot_token]
                after = run.reference(torch.tensor([x + response]))[0].softmax(-1)[len(x) - 1:-1]
                stray += sum(p for row in after.tolist() for p in row if p < LIKELY)
                logp = sum(math.log(row[t]) for row, t in zip(after.tolist(), response))
                written = grammar[prompts.index(pair.prompt), texts.index(y)].item()
                ratios.append(math.exp(logp - written))
        assert 0.01 < stray / 128 and term("stray mass") == pytest.approx(stray / 128, rel=1e-5)
        found = 1 - term("missing mass, the grammar's probabilities")
        assert found == pytest.approx(sum(ratios) / 128, rel=1e-3, abs=1e-7)
    finally:
        run.flags["batch_size"] = SETTINGS["batch_size"]


def test_the_own_loop_is_that_of_train_py(run, policies, tmp_path):
    """Eq. 7 alone, and with the stray mass, lead to the weights that train.train_dpo leads to
    (1e-6). The terms, exact labels and beta each lead elsewhere (1e-4)."""
    def trained(function, **settings):
        return function(run, tmp_path, **settings)["weights"]

    plain = trained(remedies.by_train, beta=0.5)
    assert_same(trained(remedies.fit, beta=0.5), plain, 1e-6, what="the weights, Eq. 7 alone")
    stray = trained(remedies.by_train, beta=0.5, stray_weight=2.0)
    assert_same(trained(remedies.fit, beta=0.5, add="stray mass", weight=2.0), stray, 1e-6,
                {"nothing was added": plain}, what="the weights, with the stray mass")
    others = [stray, trained(remedies.fit, beta=1.0), trained(remedies.by_train, beta=0.5,
                                                              nll_weight=0.5),
              trained(remedies.by_train, beta=0.5, stray_weight=2.0, least=0.03)]
    others += [trained(remedies.fit, beta=0.5, labels="exact")]
    others += [trained(remedies.fit, beta=0.5, add=name, weight=2.0)
               for name in ("missing mass", "KL")]
    for i, a in enumerate(others):
        for b in [plain, *others[:i]]:
            assert (a - b).abs().max() > 1e-4, i
    with pytest.raises(ValueError, match="add='a wish' is not known here"):
        remedies.fit(run, tmp_path, beta=1.0, add="a wish", weight=1.0)


# ---- What is trained, gathered and printed

def test_the_pieces_are_what_their_tables_say():
    """No two pieces have one folder. Each table has its beta, and "why" the smallest one; only
    there a piece stands in two tables. At beta 1 two policies are the run's own."""
    tables = remedies.pieces()
    names = [one.name for table in tables.values() for one in table.values()]
    assert len(names) == len(set(names)) + 3
    for table, rows in tables.items():
        beta = remedies.SMALL_BETA if table == "why" else float(table.split()[1])
        for row, one in rows.items():
            if one.function is remedies.own:
                assert beta == TOY["beta"] and one.settings["name"] in ("plain", "dpo")
            else:
                assert one.settings["beta"] == beta
            number = row.split(", ")[1] if row[0] in "smKl" and row.count(",") else ""
            if number.replace(".", "").isdigit() and one.function is not remedies.own:
                weights = {value for name, value in one.settings.items() if "weight" in name}
                assert weights == {float(number)}, row
    assert TOY["stray_weight"] == 1 and "stray mass, 1" in tables["beta 1"]


def made(folder, shift):
    """Results for every piece in a folder: a number for each figure."""
    for i, one in enumerate({one.name: one for rows in remedies.pieces().values()
                             for one in rows.values()}.values()):
        found = {name: 0.5 + shift + i / 100 for name in
                 ("gain", "j", "j_all", "wellformed", "kl", "estimate_sd")}
        more = {"term": [i, shift]} if one.settings.get("add") else {}
        write_json({"train": {k: v / 2 for k, v in found.items()}, "held_out": found} | more,
                   folder / one.name / "result.json")


def test_what_is_gathered_and_printed(tmp_path):
    """Two runs. Every table has its rows, with a number for each run in their order."""
    for name, shift in (("one", 0.0), ("two", 0.1)):
        made(tmp_path / name, shift)
    found = remedies.gather([tmp_path / "one", tmp_path / "two"])
    assert {table: list(rows) for table, rows in found.items()} == {
        table: list(rows) for table, rows in remedies.pieces().items()}
    first = found["beta 1"]["nothing: plain DPO"]
    assert first["held_out"]["gain"] == pytest.approx([0.5, 0.6])
    assert first["train"]["j"] == pytest.approx([0.25, 0.3]) and "term" not in first
    assert found["beta 1"]["missing mass, 0.15"]["term"] == [[1, 0.0], [1, 0.1]]
    printed = remedies.text_of(found).splitlines()
    line = next(line for line in printed if line.startswith("nothing: plain DPO"))
    assert line.split() == ["nothing:", "plain", "DPO"] + 4 * ["55.0", "±", "5.0"] + [
        "27.5", "±", "2.5"]
    why = printed[printed.index(next(line for line in printed if "removed" in line)):]
    removed = {line[:44].strip(): line.split()[-1] for line in why[1:1 + len(found["why"])]}
    assert list(removed) == list(found["why"])
    assert removed["nothing: plain DPO"] == "100" and removed["missing mass, 0.15"] == "0"


def test_the_share_that_is_removed_by_hand():
    """The cost is 0.9 - 0.5. A policy with 0.8 has removed three quarters of it."""
    def row(*values):
        return {"held_out": {"gain": list(values)}}
    rows = {"nothing: plain DPO": row(0.8, 1.0), "missing mass, 0.15": row(0.5, 0.5),
            "other": row(0.7, 0.9)}
    assert remedies.removed(rows, "other") == pytest.approx(0.75)
    assert remedies.removed(rows, "missing mass, 0.15") == 0


def test_other_runs_are_refused(monkeypatch):
    """A run with another beta would be a wrong row "stray mass, 1"."""
    monkeypatch.setattr(remedies, "load_toy_run", lambda folder: (TOY | {"beta": 0.5}, None, None))
    with pytest.raises(SystemExit, match="was trained with beta = 0.5; this needs runs with the"):
        remedies.main(["a folder"])
