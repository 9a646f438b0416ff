"""lab/league.py and its two files: what each method trains on, and what the table says of it."""
import contextlib
import copy
import inspect
import io
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import train
import world
from conftest import ROOT
from lab import league, league_methods, league_training, more_losses, work
from lab.finished import Finished
from lab.league_methods import CONDITIONS, EVERYWHERE, METHODS, TOLD
from support.checkpoints import fingerprint
from support.files import read_json, read_jsonl, write_json
from support.statistics import mean_and_se
from tools import assert_same


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    """A Finished run of 256 pairs: 8 steps of 32."""
    return Finished(shutil.copytree(small_run, tmp_path_factory.mktemp("league") / "run"))


def some_method(name):
    """Its loss, and its first setting."""
    return METHODS[name].loss, METHODS[name].grid[0]


# ---- The settings

def test_every_method_has_three_settings_that_its_training_takes():
    """The same budget for each. A setting is an argument of the loss, of `fit`, or of rlhf's
    learning, and none is given twice."""
    of_fit = inspect.signature(league_training.fit).parameters
    for name, method in METHODS.items():
        assert len(method.grid) == 3, name
        assert len({json.dumps(settings) for settings in method.grid}) == 3, name
        assert method.kind in league_methods.KINDS and method.kind in league.LOOK
        for settings in [*method.grid, *(told.get(name, {}) for told in TOLD.values())]:
            taken = (inspect.signature(method.loss).parameters if method.loss
                     else league_methods.Settings.__dataclass_fields__)
            for key in settings:
                assert key in taken or key in of_fit, f"{name} does not take {key}"
    titles = [method.title for method in METHODS.values()]
    assert len(set(titles)) == len(titles)
    for condition, told in TOLD.items():
        assert condition in CONDITIONS and told.keys() <= METHODS.keys()


def test_every_loss_of_the_league_of_losses_is_here_or_left_out_by_name():
    """TDPO1 and APO-down have a sister here. The three of UDRRA need rewards and not labels."""
    left_out = {"tdpo1", "apo_down", "ra", "rda", "pra"}
    used = {method.loss for method in METHODS.values()}
    for name, (loss, _) in more_losses.LEAGUE.items():
        assert (loss in used) != (name in left_out), name


# ---- The labels

class Pairs:
    """As much of a run as the labels need, with enough pairs for shares."""
    flags, seed, tokenizer = {"pairs": 3000}, 0, data.get_tokenizer("toy")


@pytest.fixture(scope="module")
def pairs():
    return Pairs()


def labels(pairs, condition):
    return [(e.prompt, e.chosen, e.rejected) for e in league_training.labelled(pairs, condition)]


def test_the_plain_labels_are_those_of_the_run(run):
    assert league_training.labelled(run, "plain") == run.examples("human")
    assert league_training.labelled(run, "length") == run.examples("length")


def test_flipped_labels_have_the_stated_share(pairs):
    """The responses are the same. The share of flipped labels is within four standard errors."""
    plain = labels(pairs, "plain")
    for condition, share in (("flip-10", 0.1), ("flip-20", 0.2)):
        flipped = 0
        for (x, w, l), new in zip(plain, labels(pairs, condition), strict=True):
            assert new in ((x, w, l), (x, l, w))
            flipped += new == (x, l, w)
        error = math.sqrt(share * (1 - share) / len(plain))
        assert flipped / len(plain) == pytest.approx(share, abs=4 * error), condition


def test_few_labels_are_the_first_ones(pairs):
    few = labels(pairs, "few")
    assert len(few) == 2500
    assert few == labels(pairs, "plain")[:2500]


def test_deterministic_labels_prefer_the_better_response(pairs):
    """Always, while about a fifth of the drawn labels prefer the worse one."""
    def wrong(condition):
        decode, count = pairs.tokenizer.decode, 0
        for x, w, l in labels(pairs, condition):
            better = world.true_reward(decode(x), decode(w[:-1]))
            count += better < world.true_reward(decode(x), decode(l[:-1]))
        return count
    assert wrong("deterministic") == 0
    assert 0.15 < wrong("plain") / 3000 < 0.25


def test_few_labels_get_as_many_steps(run, tmp_path, monkeypatch):
    """40 pairs are two batches of 32. They are gone through until there are 8 steps."""
    monkeypatch.setattr(league_training, "FEW", 40)
    league_training.labelled.cache_clear()
    loss, settings = some_method("dpo")
    league_training.fit(run, tmp_path, loss, "few", **settings)
    league_training.labelled.cache_clear()
    league_training.looked_up.cache_clear()
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"] == 7
    plan = league_training.plan_of(40, 8, 32, 0)
    assert sorted(len(batch) for batch in plan) == [8] * 4 + [32] * 4
    for k in range(4):
        assert sorted(plan[2 * k] + plan[2 * k + 1]) == list(range(40))


# ---- The training

def test_dpo_in_the_league_is_train_pys_dpo_to_the_bit(run, tmp_path):
    """Eq. 7 alone, and with the stray mass, which is the default run."""
    loss, settings = some_method("dpo")
    settings = settings | {"lr": run.flags["lr"]}
    for weight, want in ((0.0, run.models["plain"]), (1.0, run.models["dpo"])):
        policy, stopped = league_training.fit(run, tmp_path, loss, "plain", stray_weight=weight,
                                              **settings)
        assert stopped is None
        assert fingerprint(policy) == fingerprint(want)
        assert run.flags["stray_weight"] == 1


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.loss])
def test_every_method_trains(run, tmp_path, name):
    loss, settings = some_method(name)
    if name == "online":
        settings = settings | {"rounds": 2}
    reference = fingerprint(run.reference)
    policy, stopped = league_training.fit(run, tmp_path, loss, "plain", **settings)
    assert stopped is None
    assert fingerprint(policy) != reference
    assert fingerprint(run.reference) == reference, "the run's reference has moved"


@pytest.fixture
def apart(run, monkeypatch):
    """A run whose new policies are not the reference: at the reference many terms are 0."""
    def new_policy():
        return copy.deepcopy(run.models["dpo"]).requires_grad_(True)
    monkeypatch.setattr(run, "new_policy", new_policy)
    return run


def first_gradient(run, folder, monkeypatch, loss, **settings):
    """The gradient of the first step, before it is clipped, a vector."""
    monkeypatch.setattr(league_training, "clip_grad_norm_",
                        lambda parameters, most: torch.tensor(math.inf))
    policy, stopped = league_training.fit(run, folder, loss, "plain", **settings)
    assert stopped.startswith("step 0")
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


class ByHand:
    """The log-probabilities of the first batch, one text at a time, without padding."""

    def __init__(self, run):
        examples = run.examples("human")
        self.pairs = [examples[i] for i in data.epochs([1] * 256, 32, run.seed, 1)[0]]
        self.policy, self.reference = run.new_policy(), run.reference
        sides = [(e.prompt, e.chosen) for e in self.pairs]
        sides += [(e.prompt, e.rejected) for e in self.pairs]
        self.sides = sides
        self.pi = [self.distributions(self.policy, *side) for side in sides]
        self.ref = [self.distributions(self.reference, *side) for side in sides]

    def distributions(self, model, prompt, response):
        """log pi(. | x, y_<t) of every response position, (n, V)"""
        logits = model(torch.tensor([prompt + response]))[0]  # (T, V)
        return torch.log_softmax(logits, -1)[len(prompt) - 1:-1]

    def tokens(self, tables):
        """log pi(y_t | x, y_<t) of each response, a list of vectors"""
        return [table[range(len(y)), y] for table, (_, y) in zip(tables, self.sides)]

    def sums(self, tables):
        return torch.stack([logps.sum() for logps in self.tokens(tables)])  # (2B,)

    def lengths(self):
        return torch.tensor([float(len(y)) for _, y in self.sides]).chunk(2)

    def log_ratios(self):
        """w and l"""
        return (self.sums(self.pi) - self.sums(self.ref).detach()).chunk(2)

    def gradient(self, losses):
        grads = torch.autograd.grad(losses.mean(), list(self.policy.parameters()))
        return torch.cat([g.flatten() for g in grads])


def dpo_by_hand(hand, beta):
    w, l = hand.log_ratios()
    return -F.logsigmoid(beta * (w - l))


def ipo_by_hand(hand, beta):
    w, l = hand.log_ratios()
    return (w - l - 1 / (2 * beta)) ** 2


def simpo_by_hand(hand, beta, gamma):
    chosen, rejected = hand.sums(hand.pi).chunk(2)
    chosen_lengths, rejected_lengths = hand.lengths()
    return -F.logsigmoid(beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma)


def tdpo2_by_hand(hand, beta, alpha):
    w, l = hand.log_ratios()
    d = [0.0 for _ in hand.sides]
    for i, (p, ref) in enumerate(zip(hand.pi, hand.ref)):
        for t in range(len(p)):
            d[i] = d[i] + (ref[t].exp().detach() * (ref[t].detach() - p[t])).sum()
    d_w, d_l = torch.stack(d).chunk(2)
    return -F.logsigmoid(beta * (w - l - alpha * (d_l - d_w.detach())))


def kto_by_hand(hand, beta):
    """Row i of the 64 has the prompt of row i and the response of row i - 1."""
    w, l = hand.log_ratios()
    ratios = []
    for i, (x, _) in enumerate(hand.sides):
        y = hand.sides[i - 1][1]
        both = [hand.distributions(model, x, y)[range(len(y)), y].sum().item()
                for model in (hand.policy, hand.reference)]
        ratios.append(both[0] - both[1])
    kl = max(0.0, sum(ratios) / len(ratios))
    assert abs(sum(ratios)) > 1e-3, "this policy would not show which pairs are taken"
    return 1 - torch.sigmoid(beta * (w - kl)) + 1 - torch.sigmoid(beta * (kl - l))


def bco_by_hand(hand, beta):
    """At the first step the running mean is that of the batch."""
    w, l = hand.log_ratios()
    delta = beta * torch.cat([w, l]).mean().item()
    return -F.logsigmoid(beta * w - delta) - F.logsigmoid(-(beta * l - delta))


def bmc_by_hand(hand, beta, bmc):
    """A token counts twice or more unless it belongs to a block that both responses share."""
    totals = {}
    for who, tables in (("pi", hand.pi), ("ref", hand.ref)):
        sums = []
        for i, logps in enumerate(hand.tokens(tables)):
            own, other = hand.sides[i][1], hand.sides[(i + 32) % 64][1]
            total = 0.0
            for logp, mark in zip(logps, league_training.changed(tuple(own), tuple(other))):
                weight = 1 + mark * min(1 / logp.exp().item(), bmc)
                total = total + weight * logp
            sums.append(total)
        totals[who] = torch.stack(sums)
    w, l = (totals["pi"] - totals["ref"].detach()).chunk(2)
    return -F.logsigmoid(beta * (w - l))


@pytest.mark.parametrize("name, by_hand", [
    ("dpo", dpo_by_hand), ("ipo", ipo_by_hand), ("simpo", simpo_by_hand), ("tdpo2", tdpo2_by_hand),
    ("kto", kto_by_hand), ("bco_pair", bco_by_hand), ("bmc", bmc_by_hand)])
def test_the_gradient_of_a_step_is_that_of_the_formula(apart, tmp_path, monkeypatch, name,
                                                       by_hand):
    """From a policy that is not the reference, in float32: 1e-4 of the largest entry."""
    loss, settings = METHODS[name].loss, METHODS[name].grid[-1]
    got = first_gradient(apart, tmp_path, monkeypatch, loss, **settings)
    hand = ByHand(apart)
    want = hand.gradient(by_hand(hand, **{k: v for k, v in settings.items() if k != "lr"}))
    scale = want.abs().max()
    assert scale > 1e-3
    assert_same(got / scale, want / scale, 1e-4, what=f"the gradient of {name}")


def test_the_divergence_of_tdpo_is_a_sum_over_positions_and_the_vocabulary(apart):
    hand = ByHand(apart)
    batch = data.collate(hand.pairs)
    got = league_training.vocabulary_kl(hand.policy, hand.reference, batch["tokens"],
                                        batch["response_mask"])
    want = [sum(F.kl_div(p[t], ref[t], reduction="sum", log_target=True).item()
                for t in range(len(p))) for p, ref in zip(hand.pi, hand.ref)]
    reverse = [sum(F.kl_div(ref[t], p[t], reduction="sum", log_target=True).item()
                   for t in range(len(p))) for p, ref in zip(hand.pi, hand.ref)]
    assert_same(got.detach(), torch.tensor(want), 1e-4,
                {"this is KL(pi||ref)": torch.tensor(reverse)}, what="KL(ref||pi)")


def test_ktos_pairs_are_mismatched(run):
    """Each prompt has the response of another pair or of the other side, and each response is
    there once."""
    examples = run.examples("human")[:32]
    tokens, mask = league_training.mismatched(examples)
    right = data.collate(examples)

    def rows(tokens, mask):
        return [(row[:m.int().argmax()].tolist(), row[m].tolist()) for row, m in zip(tokens, mask)]
    before, after = rows(right["tokens"], right["response_mask"]), rows(tokens, mask)
    assert [x for x, _ in after] == [x for x, _ in before]
    assert [y for _, y in after] == [before[i - 1][1] for i in range(64)]
    assert sum(a == b for a, b in zip(after, before)) == 0


def test_the_marks_of_bmc_by_hand():
    """(1, 2, 3, 4) becomes (1, 5, 3, 4, 6): its second token goes, and two come."""
    assert league_training.changed((1, 2, 3, 4), (1, 5, 3, 4, 6)) == [False, True, False, False]
    assert league_training.changed((1, 5, 3, 4, 6), (1, 2, 3, 4)) == [False, True, False, False,
                                                                      True]


# ---- Online DPO and the moving reference

def test_online_pairs_come_from_the_policy_as_it_is(run, tmp_path, monkeypatch):
    """Four rounds of 64 pairs. The first policy is the reference, and each later one is new. Every
    batch is made of pairs of its own round."""
    asked, batches, new_pairs = [], [], league_training.new_pairs

    def note(run, policy, first, count, condition):
        pairs = new_pairs(run, policy, first, count, condition)
        asked.append((fingerprint(policy), first, pairs))
        return pairs
    collate = data.collate
    monkeypatch.setattr(league_training, "new_pairs", note)
    monkeypatch.setattr(league_training.data, "collate", lambda examples, **other:
                        batches.append(examples) or collate(examples, **other))
    monkeypatch.setattr(train, "reference_logps", lambda reference, examples, size, likely:
                        (torch.zeros(len(examples)), torch.zeros(len(examples))))
    loss, settings = some_method("dpo")
    league_training.fit(run, tmp_path, loss, "plain", rounds=4, **settings)
    assert len({policy for policy, _, _ in asked}) == 4
    assert asked[0][0] == fingerprint(run.reference)
    assert [first for _, first, _ in asked] == [0, 64, 128, 192], "the prompts come in turn"
    assert sum(len(pairs) for _, _, pairs in asked) == 256, "as many labels as the run has"
    assert len(batches) == 8
    for step, batch in enumerate(batches):
        own = asked[step // 2][2]
        assert all(any(pair is other for other in own) for pair in batch)


@pytest.mark.parametrize("condition", ["plain", "flip-20", "deterministic", "length"])
def test_new_pairs_get_fresh_labels_of_the_condition(run, condition):
    """A policy that always writes the same two texts. The share of labels for the better one is
    that of Bradley-Terry, 20% of them flipped, or 1 (four standard errors)."""
    prompt, texts = run.train_prompts[0], world.responses()
    good, bad = texts[100], texts[1]
    count, eos = 2000, [run.tokenizer.eot_token]
    ids = [run.tokenizer.encode_ordinary(text) + eos for text in (good, bad)]
    policy = SimpleNamespace(generate=lambda prompts, most, eos_id:
                             [ids[0]] * count + [ids[1]] * count)
    one = SimpleNamespace(prompt_ids=run.prompt_ids[:1], tokenizer=run.tokenizer)
    pairs = league_training.new_pairs(one, policy, 0, count, condition)
    score = world.length_score if condition == "length" else world.true_reward
    p = 1 / (1 + math.exp(score(prompt, bad) - score(prompt, good)))
    want = {"flip-20": 0.8 * p + 0.2 * (1 - p), "deterministic": float(p > 0.5)}.get(condition, p)
    wins = sum(pair.chosen == ids[0] for pair in pairs) / count
    assert wins == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / count) + 1e-9)
    for pair in pairs:
        assert pair.prompt == run.prompt_ids[0]
        assert sorted([pair.chosen, pair.rejected]) == sorted(ids)


def test_a_moving_reference_moves_and_the_runs_own_stays(run, tmp_path, monkeypatch):
    """One move with mix 1, after 4 of 8 steps: the reference becomes the policy."""
    used, policies = [], []
    look_up, move = train.reference_logps, league_training.move
    monkeypatch.setattr(train, "reference_logps", lambda model, *rest:
                        used.append(fingerprint(model)) or look_up(model, *rest))
    monkeypatch.setattr(league_training, "move", lambda reference, policy, mix:
                        policies.append(fingerprint(policy)) or move(reference, policy, mix))
    loss, settings = some_method("dpo")
    own = fingerprint(run.reference)
    league_training.looked_up.cache_clear()
    league_training.fit(run, tmp_path, loss, "plain", moves=1, **settings)
    assert used == [own, policies[0]] and policies[0] != own
    league_training.fit(run, tmp_path, loss, "plain", **settings)
    assert len(used) == 2, "what the run's own reference thinks of the pairs is computed once"
    assert fingerprint(run.reference) == own


def test_a_move_by_hand(run):
    reference, policy = copy.deepcopy(run.reference), run.models["dpo"]
    league_training.move(reference, policy, 0.25)
    for new, old, its in zip(reference.parameters(), run.reference.parameters(),
                             policy.parameters()):
        assert_same(new, 0.75 * old + 0.25 * its, 1e-6, what="the reference")


# ---- Results

def test_a_training_that_diverges_is_a_result(run, tmp_path):
    """It says at which step, it is never chosen, and the table shows it."""
    folder = tmp_path / "dpo"
    folder.mkdir()
    row = league.train_one(run, folder, "dpo", "plain", lr=1e30, beta=1.0)
    assert row["stopped"].startswith("step ") and "gradient" in row["stopped"]
    assert set(row) == {"stopped", "seconds"}


def test_a_policy_learning_that_falls_apart_is_a_result_too(run, tmp_path, monkeypatch):
    """torch's own error, where a policy's probabilities are nan. Any other error is raised."""
    name = run.folder / "league" / "plain" / "reward"
    model = league.RewardModel(run.reference)
    league.checkpoints.save(model.state_dict(), name / "reward.pt")
    write_json({"seconds": 5.0}, name / "result.json")

    def draw(*args, **other):
        torch.multinomial(torch.tensor([math.nan, 1.0]), 1)
    monkeypatch.setattr(league, "learn", draw)
    row = league.train_one(run, tmp_path, "ppo", "plain", lr=1.0)
    assert "probability tensor" in row["stopped"] and row["seconds"] > 5

    def fail(*args, **other):
        raise RuntimeError("something else")
    monkeypatch.setattr(league, "learn", fail)
    with pytest.raises(RuntimeError, match="something else"):
        league.train_one(run, tmp_path, "ppo", "plain", lr=1.0)


def test_the_columns_are_what_they_are_called(run):
    """Each from its definition, for the policy of the run."""
    policy = run.models["plain"]
    row = league.measured(run, policy, "plain")
    known = run.measure(policy)
    for column in ("reward", "kl", "objective", "wellformed"):
        assert row[column] == pytest.approx(known[column]), column
    r = evaluate.held_out_rewards()
    p = evaluate.exact_logps(policy, run.held_out)
    ref = evaluate.exact_logps(run.reference, run.held_out)
    p, ref = p.log_softmax(-1), ref.log_softmax(-1)
    star = torch.softmax(ref + r, -1)
    assert row["to_optimum"] == pytest.approx((star * (star.log() - p)).sum(-1).mean().item())
    best = torch.logsumexp(ref + r, -1).mean().item()  # J* = log Z where beta is 1
    assert row["of_optimum"] == pytest.approx(known["objective"] / best)
    assert row["captured"] == pytest.approx(evaluate.captured(known, run.ref_logps)[2])
    examples = run.examples("human")
    chosen = [train.reference_logps(model, examples, 64)[0].mean().item()
              for model in (policy, run.reference)]
    assert row["chosen"] == pytest.approx(chosen[0] - chosen[1], abs=1e-4)


def test_a_setting_is_chosen_by_the_training_prompts(run, monkeypatch):
    """J on the training prompts, by hand. It needs no reward of a held-out prompt."""
    policy, prompts = run.models["plain"], run.train_prompts
    assert len(prompts) == 24 and not set(prompts) & set(run.held_out)
    p = evaluate.exact_logps(policy, prompts).log_softmax(-1)
    ref = evaluate.exact_logps(run.reference, prompts).log_softmax(-1)
    r = world.rewards(prompts, world.responses())
    want = (p.exp() * (r - (p - ref))).sum(-1).mean().item()
    assert league.measured(run, policy, "plain")["tuned_by"] == pytest.approx(want)


def test_the_largest_j_is_chosen_and_never_a_training_that_stopped():
    a, b, c = {"beta": 1.0}, {"beta": 2.0}, {"beta": 3.0}
    tuned = {"one": [(a, 0.5), (b, 0.7), (c, 0.6)], "two": [(a, None), (b, math.nan), (c, -9.0)],
             "three": [(a, None), (b, None), (c, None)]}
    assert league.choose(tuned) == {"one": b, "two": c, "three": a}


# ---- The command

SMALL = {name: METHODS[name]._replace(grid=METHODS[name].grid[:count])
         for name, count in (("dpo", 2), ("ppo", 1))}
SMALL["ipo"] = METHODS["ipo"]._replace(grid=[{"lr": 1e30, "beta": 1.0}])  # it diverges


def command(folders, processes=ThreadPoolExecutor):
    """What the command prints for three methods in two conditions, in this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(work, "processes", processes)
        patch.setattr(work.os, "cpu_count", lambda: 1)  # the seed is one for all threads
        patch.setattr(torch, "set_num_threads", lambda count: None)  # it would outlast the test
        patch.setattr(league, "METHODS", SMALL)
        patch.setattr(league, "SAMPLES", 512)
        patch.setattr(league, "ROOT", folders[0].parent)
        league.main([*map(str, folders), "--conditions", "plain", "flip-20", "--record"])
    return printed.getvalue()


@pytest.fixture(scope="module")
def small_league(small_run, tmp_path_factory):
    """The folders of two runs after the command, and what it has printed. The second run is the
    first one with another seed."""
    root = tmp_path_factory.mktemp("small-league")
    folders = [shutil.copytree(small_run, root / str(seed)) for seed in (0, 1)]
    flags = read_json(folders[1] / "flags.json")
    write_json(flags | {"seed": 1}, folders[1] / "flags.json")
    (root / "docs").mkdir()
    return folders, command(folders)


def test_the_league_in_small(small_league):
    """The table, the figures and the record say what was found."""
    folders, said = small_league
    found = read_json(folders[0] / "league" / "league.json")
    assert found == read_json(folders[0].parent / "docs" / "league.json")
    assert found["seeds"] == [0, 1]
    assert (folders[0].parent / "docs" / "league.png").stat().st_size > 20_000
    for condition in ("plain", "flip-20"):
        assert (folders[0] / "league" / f"{condition}.png").stat().st_size > 20_000
        lines, rows = said.split(f"{condition}: ")[1].splitlines(), found["results"][condition]
        for name in ("dpo", "ppo"):
            mean = 50 * sum(row["of_optimum"] for row in rows[name])
            line = next(line for line in lines if line.startswith(f"{METHODS[name].title}  "))
            assert f"{mean:.1f} ± " in line
        line = next(line for line in lines if line.startswith("IPO  "))
        assert "STOPPED on 2 of 2 runs: step" in line
        assert all("stopped" in row for row in rows["ipo"])


def test_the_first_run_alone_is_tuned_on_and_the_larger_j_is_taken(small_league):
    folders, _ = small_league
    found = read_json(folders[0] / "league" / "league.json")
    (a, j_a), (b, j_b) = found["tuned"]["dpo"]
    assert found["settings"]["dpo"] == (a if j_a >= j_b else b)
    tried = [len(list((folder / "league" / "plain").glob("dpo_*"))) for folder in folders]
    assert tried == [2, 1]


def test_a_second_call_trains_nothing_and_says_the_same(small_league):
    folders, said = small_league
    assert command(folders, processes=None) == said  # no process is needed


def test_no_method_is_above_the_frontier(small_league):
    """The mean over the runs of every method is below the mean frontier."""
    found = read_json(small_league[0][0] / "league" / "league.json")
    line = found["frontier"]
    for rows in found["results"].values():
        for name, per_run in rows.items():
            if name != "ipo":
                kl = sum(row["kl"] for row in per_run) / 2
                reward = sum(row["reward"] for row in per_run) / 2
                at = next(i for i, k in enumerate(line["kl"]) if k >= kl)
                assert reward <= line["reward"][at] + 1e-9, name


def test_every_name_is_in_the_figure_once(monkeypatch, tmp_path):
    """A league with all methods, made up. A method that diverged is in no panel."""
    rows = {name: [{"kl": 0.1 * i, "reward": 0.15 * i, "wellformed": i / 40, "of_optimum": 0.03 * i,
                    "captured": 0.9}] for i, name in enumerate(METHODS)}
    rows["dpo"] = [{"stopped": "step 3: the loss is nan", "seconds": 1.0}]
    made_up = {"results": {"plain": rows}, "frontier": {
        "kl": [0.0, 1.0, 4.0], "reward": [0.0, 2.0, 3.0], "optimum": {"kl": 0.9, "reward": 2.0}}}
    drawn = []
    monkeypatch.setattr(league.figures, "save", lambda fig, path: drawn.append(fig))
    league.draw(made_up, "plain", tmp_path / "a.png")
    texts = [text.get_text() for ax in drawn[0].axes for text in ax.texts]
    plt.close(drawn[0])
    titles = [METHODS[name].title for name in METHODS if name != "dpo"]
    assert sorted(texts) == sorted(titles)


def test_an_interrupted_training_begins_anew(run, tmp_path):
    """What it has saved lacks the moved reference. It is not read, and the policy is the same."""
    loss, settings = some_method("tr_dpo")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "state.pt").write_bytes(b"what an interruption has left")
    policies = [league_training.fit(run, tmp_path / name, loss, "plain", **settings)[0]
                for name in "ab"]
    assert fingerprint(policies[0]) == fingerprint(policies[1])


def test_what_was_done_before_an_interruption_is_kept(small_league):
    """One result is taken away. It is made again, and no other file changes."""
    folders, _ = small_league
    done = sorted(folders[0].glob("league/*/dpo_*/result.json"))
    before = {file: file.read_bytes() for file in done}
    done[0].unlink()
    command(folders)
    after = {file: file.read_bytes() for file in done}
    assert [file for file in done if after[file] != before[file]] in ([], [done[0]])


def test_runs_that_are_no_seeds_of_one_run_are_refused(small_run, tmp_path):
    folder = shutil.copytree(small_run, tmp_path / "run")
    with pytest.raises(SystemExit, match="must differ in their seeds, and in nothing else"):
        league.main([str(folder), str(folder)])
    flags = read_json(folder / "flags.json")
    write_json(flags | {"seed": 7, "pairs": 10}, folder / "flags.json")
    with pytest.raises(SystemExit, match="must differ in their seeds, and in nothing else"):
        league.main([str(small_run), str(folder)])
    other = shutil.copytree(small_run, tmp_path / "other")
    for name in ("sft.pt", "dpo.pt"):
        assert (other / name).exists()
    write_json(flags | {"beta": 0.5}, other / "flags.json")
    with pytest.raises(SystemExit, match="beta = 0.5: the settings of the league are made for"):
        league.main([str(other)])


# ---- The page

PAGE = (ROOT / "docs" / "league.md").read_text(encoding="utf-8")
RECORDED = read_json(ROOT / "docs" / "league.json")


def over_seeds(name, column, condition="plain"):
    return mean_and_se([row[column] for row in RECORDED["results"][condition][name]])


def rows_with_errors(text):
    """The lines of its tables that hold a standard error."""
    return [line for line in text.splitlines() if line.startswith("| ") and " ± " in line]


def test_the_table_of_the_page_is_the_recorded_league():
    """All methods, the largest J first, three seeds each. The settings are those of today."""
    rows = RECORDED["results"]["plain"]
    assert rows.keys() == METHODS.keys() and RECORDED["seeds"] == [0, 1, 2]
    columns = {"of_optimum": (1, 100), "captured": (1, 100), "kl": (2, 1), "wellformed": (1, 100),
               "to_optimum": (3, 1), "chosen": (2, 1), "seconds": (0, 1)}
    wanted = []
    for name in sorted(rows, key=lambda name: -over_seeds(name, "of_optimum")[0]):
        cells = [METHODS[name].title]
        for column, (digits, scale) in columns.items():
            mean, error = [scale * value for value in over_seeds(name, column)]
            cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
        wanted.append(f"| {' | '.join(cells)} |")
    assert rows_with_errors(PAGE.split("## Other conditions")[0]) == wanted
    for name, method in METHODS.items():
        assert [settings for settings, _ in RECORDED["tuned"][name]] == method.grid, name


def test_the_table_of_conditions_is_the_recorded_league():
    """J/J* of half of the methods in each condition, in the order of the plain one, three seeds."""
    assert list(RECORDED["results"]) == list(CONDITIONS), "some condition is not recorded"
    for condition in list(CONDITIONS)[1:]:
        assert RECORDED["results"][condition].keys() == set(EVERYWHERE)
    wanted = []
    for name in sorted(EVERYWHERE, key=lambda name: -over_seeds(name, "of_optimum")[0]):
        cells = [METHODS[name].title]
        for condition in CONDITIONS:
            mean, error = over_seeds(name, "of_optimum", condition)
            cells.append(f"{100 * mean:.1f} ± {100 * error:.1f}")
        wanted.append(f"| {' | '.join(cells)} |")
    assert rows_with_errors(PAGE.split("## Other conditions")[1]) == wanted


def test_what_the_page_says_in_words_holds():
    """Its sentences about groups of methods, on the recorded means."""
    j = {name: 100 * over_seeds(name, "of_optimum")[0] for name in METHODS}
    share = {name: 100 * over_seeds(name, "captured")[0] for name in METHODS}
    mass = {name: 100 * over_seeds(name, "wellformed")[0] for name in METHODS}
    kl = {name: over_seeds(name, "kl")[0] for name in METHODS}
    of_kind = {kind: [name for name, method in METHODS.items() if method.kind == kind]
               for kind in league.KINDS}
    assert j["dpo"] > max(j.values()) - 0.3, "DPO is among the first"
    for name in ("ipo", "exo_pair", "robust", "cdpo", "hinge", "sigmoid_norm"):
        assert j["dpo"] - 2 < j[name] <= j["dpo"] and 97 < share[name] < 98.5, name
    assert all(mass[name] < 90 for name in of_kind["difference"])
    assert mass["stray"] > 99 and j["stray"] > j["dpo"] - 0.3, "at no loss of J"
    for name in ("rpo", "dpop", "tdpo2"):
        assert mass[name] < mass["stray"] - 2, name
    assert all(mass[name] > 96 for name in of_kind["levels"])
    levels = sorted(of_kind["levels"], key=lambda name: j[name])
    assert set(levels[:2]) == {"kto", "apo_zero"} and levels[-1] == "bco_pair"
    assert j["kto"] == pytest.approx(j["apo_zero"], abs=0.5), "one loss"
    assert all(j[name] < 90 for name in of_kind["alone"])
    assert all((mass[name] > 98) == (name != "simpo") for name in of_kind["alone"])
    assert mass["online"] == max(mass.values())
    assert 1 < j["dpo"] - j["online"] < 3 and abs(j["ppo"] - j["online"]) < 0.5
    far = [row["of_optimum"] for row in RECORDED["results"]["plain"]["reinforce"]]
    assert sum(value < 0.6 for value in far) == 1, "one seed of three"
    assert mass["tr_dpo"] < 75 and 1.5 < j["dpo"] - j["tr_dpo"] < 2.7
    assert mass["chi_po"] == min(mass.values()) < 10 and j["chi_po"] > j["dpo"] - 1
    assert kl["simpo"] > 1.4 and sorted(kl, key=kl.get)[-2:] == ["simpo", "aot"]
    assert 45 < j["aot"] < 55, "half of J"


def test_what_the_page_says_of_the_other_conditions_holds():
    """Its sentences about them, on the recorded means."""
    j = {condition: {name: 100 * over_seeds(name, "of_optimum", condition)[0]
                     for name in EVERYWHERE} for condition in CONDITIONS}
    lost = {condition: {name: j["plain"][name] - j[condition][name] for name in EVERYWHERE}
            for condition in CONDITIONS}

    def first(condition):
        return max(j[condition], key=j[condition].get)

    for condition, robust, dpo in (("flip-10", 1, 13), ("flip-20", 5, 35)):
        assert first(condition) == "robust"
        assert lost[condition]["robust"] == pytest.approx(robust, abs=0.5)
        assert lost[condition]["dpo"] == pytest.approx(dpo, abs=0.5)
        assert all(lost[condition][name] < lost[condition]["dpo"] - 5
                   for name in ("sppo_hard", "pro", "hinge", "ipo"))
        assert j[condition]["cdpo"] < j[condition]["dpo"] - 1
        for name in EVERYWHERE:
            share = 100 * over_seeds(name, "captured", condition)[0]
            assert (share > 91) == (name not in ("kto", "simpo")), (condition, name)
    assert first("few") == "chi_po" and over_seeds("chi_po", "wellformed", "few")[0] < 0.5
    assert j["few"]["stray"] - j["few"]["dpo"] == pytest.approx(6, abs=0.5)
    assert all(over_seeds(name, "captured", "few")[0] < 0.9 for name in EVERYWHERE)
    assert j["few"]["ppo"] == pytest.approx(39, abs=0.5) and j["few"]["online"] < 0
    assert over_seeds("dpo", "kl", "deterministic")[0] == pytest.approx(3.3, abs=0.05)
    assert 100 * over_seeds("dpo", "captured", "deterministic")[0] == pytest.approx(98, abs=0.5)
    order = sorted(EVERYWHERE, key=lambda name: -j["deterministic"][name])
    assert order[:4] == ["ipo", "pro", "sppo_hard", "kto"] and order[-1] == "online"
    assert first("length") == "r_dpo" and lost["length"]["r_dpo"] == pytest.approx(2, abs=0.5)
    assert all(7.5 < lost["length"][name] < 13 for name in EVERYWHERE if name != "r_dpo")
