"""lab/systems.py and its files: what each system minimises, against sums written out by hand."""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import world
from conftest import ROOT
from dpo import dpo_loss
from lab import aihf, mdpo, more_losses, systems, systems_training, tabular, work
from lab.judges import by_text
from losses import LIKELY
from model import GPT, GPTConfig, response_logits
from rlhf import Settings, learn
from support.files import write_json
from tools import assert_same, vector

TOKENIZER = data.get_tokenizer("toy")


def random_gpt(seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig(64, TOKENIZER.n_vocab, n_layer=1, n_head=1, n_embd=16)).eval()


class Fake:
    """What the pieces need of a Finished run, with random weights in the place of a training."""

    def __init__(self):
        self.flags = {"pairs": 64, "batch_size": 16, "epochs": 1, "lr": 1e-3, "stray_weight": 1.0}
        self.seed, self.beta, self.device, self.tokenizer = 0, 1.0, "cpu", TOKENIZER
        self.reference = random_gpt(1).requires_grad_(False)
        self.train_prompts, self.held_out = world.prompts()
        self.prompt_ids = [TOKENIZER.encode_ordinary(x) for x in self.train_prompts]
        # a reference that writes reviews, for what is measured
        self.ref_logps = world.grammar_logps(self.held_out)  # (P, N)

    def new_policy(self):
        return copy.deepcopy(self.reference).requires_grad_(True)


@pytest.fixture(scope="module")
def run():
    return Fake()


@pytest.fixture(scope="module")
def other():
    """A policy that is not the reference."""
    return random_gpt(2)


# ---- The loop

class Stop(Exception):
    pass


def first_gradient(run, tmp_path, monkeypatch, module, train):
    """The gradient of the first step that a loop takes, and the numbers of its rows."""
    found = {}

    def note(parameters, _):
        found["gradient"] = torch.cat([p.grad.flatten() for p in parameters])
        raise Stop
    monkeypatch.setattr(module, "clip_grad_norm_", note)
    epochs = data.epochs

    def plan(*args, **kwargs):
        found["plan"] = epochs(*args, **kwargs)
        return found["plan"]
    monkeypatch.setattr(data, "epochs", plan)
    with pytest.raises(Stop):
        train()
    return found["gradient"], found["plan"][0]


def rows_of(model, examples):
    """[(log-probabilities over the vocabulary (t,V), response)], chosen first, by a plain forward
    of one text at a time."""
    out = []
    for side in ("chosen", "rejected"):
        for e in examples:
            y = getattr(e, side)
            logits = model(torch.tensor([e.prompt + y]))[0]  # (T, V)
            out.append((logits[len(e.prompt) - 1:-1].log_softmax(-1), y))
    return out


def sums_by_hand(model, examples, delta=None):
    """log pi of each response, chosen first. (2b,)"""
    b, sums = len(examples), []
    sides = [e.chosen for e in examples] + [e.rejected for e in examples]
    for i, (logps, y) in enumerate(rows_of(model, examples)):
        marks = systems_training.changed(tuple(y), tuple(sides[(i + b) % (2 * b)]))
        total = 0.0
        for t, token in enumerate(y):
            weight = 1.0
            if delta is not None and marks[t]:
                weight += min(1 / logps[t, token].exp().item(), delta)
            total = total + weight * logps[t, token]
        sums.append(total)
    return torch.stack(sums)


def stray_by_hand(model, reference, examples):
    """The policy's mass on the tokens below 1 % under the reference: a sum over places, divided by
    the number of responses."""
    total = 0.0
    for (logps, _), (ref, _) in zip(rows_of(model, examples), rows_of(reference, examples)):
        total = total + logps.exp()[ref.exp() < LIKELY].sum()
    return total / (2 * len(examples))


def dpo_by_hand(policy, ref, beta):
    w, l = (policy - ref.detach()).chunk(2)
    return -F.logsigmoid(beta * (w - l)).mean()


@pytest.mark.parametrize("name", ["itself", "none", "weights", "no stray mass"])
def test_the_first_gradient_is_that_of_the_formula(run, other, tmp_path, monkeypatch, name):
    """Eq. 7 with the reference's own log-probabilities, with none, and with BMC's weights on both
    sides; and the stray mass. float32: 1e-4 of the largest entry."""
    pairs, beta = systems_training.known(run), 0.7
    zeros = [torch.zeros(len(pairs.examples))] * 2
    options = {"none": {"ref_logps": zeros}, "weights": {"delta": 2.0},
               "no stray mass": {"stray_weight": 0.0}}.get(name, {})
    got, indices = first_gradient(run, tmp_path, monkeypatch, systems_training, lambda: (
        systems_training.fit(run, tmp_path, pairs, beta=beta, start=other, **options)))
    policy, some = copy.deepcopy(other), [pairs.examples[i] for i in indices]
    delta = options.get("delta")
    ref = sums_by_hand(run.reference, some, delta)  # (2b,)
    own = sums_by_hand(policy, some, delta)  # (2b,)
    loss = dpo_by_hand(own, torch.zeros_like(ref) if name == "none" else ref, beta)
    if name != "no stray mass":
        loss = loss + stray_by_hand(policy, run.reference, some)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    wrong = torch.autograd.grad(dpo_by_hand(sums_by_hand(policy, some), ref, 1.0),
                                list(policy.parameters()))
    scale = want.abs().max()
    assert scale > 1e-3
    assert_same(got / scale, want / scale, 1e-4, {
        "beta is missing, and so is the stray mass": torch.cat([g.flatten() for g in wrong]) / scale
    }, what=f"the gradient of {name}")


def test_weights_of_1_are_dpo_and_others_are_those_of_the_function(run, other):
    """delta = 0 is no weight: equal to the bit of rounding, 1e-5. delta = 2: more_losses.bmc_logps,
    which has its own tests, of the padded batch."""
    some = systems_training.known(run).examples[:16]
    batch = data.collate(some)
    parts = response_logits(other, **batch)
    plain, none, weighted = [systems_training.weighted_sums(*parts, some, delta)
                             for delta in (None, 0.0, 2.0)]
    assert_same(none, plain, 1e-5, what="weights of 1")
    assert (weighted - plain).abs().max() > 1
    mask = batch["response_mask"][:, 1:]
    logps = torch.zeros(mask.shape).masked_scatter(
        mask, -F.cross_entropy(*parts[:2], reduction="none"))
    marks = torch.zeros_like(mask).masked_scatter(mask, systems_training.marks_of(some))
    assert_same(weighted, more_losses.bmc_logps(logps, mask, marks, 2.0), 1e-3,
                {"no weights": plain}, what="weighted sums")
    chosen, rejected = systems_training.weighted_reference(other, some, 2.0)
    assert_same(torch.cat([chosen, rejected]), weighted.detach(), 1e-3, what="the reference's")


# ---- Pairs and true values

@pytest.mark.parametrize("editor", ["chance", "judge"])
def test_a_bridged_pair_differs_in_one_word_of_the_winners(run, editor):
    """The loser stays. The judge takes the best edit, found here by trying all of them."""
    generator, places = torch.Generator().manual_seed(0), set()
    for pair in systems_training.pairs_of(run)[:40]:
        new = systems_training.bridge(pair, editor, generator)
        winner, loser, edited = [world.parse(y) for y in (pair.chosen, pair.rejected, new.chosen)]
        [place] = [i for i in range(6) if edited[i] != loser[i]]
        assert edited[place] == winner[place] and new.rejected == pair.rejected
        places.add(place)
        texts = {world.parse(y): y for y in world.responses()}
        tries = [(*loser[:i], winner[i], *loser[i + 1:]) for i in range(6) if winner[i] != loser[i]]
        best = max(world.true_reward(pair.prompt, texts[words]) for words in tries)
        reward = world.true_reward(pair.prompt, new.chosen)
        assert reward == pytest.approx(best) if editor == "judge" else reward <= best + 1e-9
    assert len(places) == 6


def test_the_true_values_of_pairs(run, monkeypatch):
    """Rewards from world.true_reward; log Z as a plain sum of exponentials, 1e-5."""
    logps = world.grammar_logps(run.train_prompts)
    monkeypatch.setattr(evaluate, "exact_logps", lambda model, prompts: logps)
    chosen, rejected, log_z = systems_training.true_values(run)
    for i in (0, 7, 40):
        p = systems_training.pairs_of(run)[i]
        x = run.train_prompts.index(p.prompt)
        total = sum(math.exp(lp + world.true_reward(p.prompt, y))
                    for lp, y in zip(logps[x].tolist(), world.responses()))
        want = (world.true_reward(p.prompt, p.chosen), world.true_reward(p.prompt, p.rejected),
                math.log(total))
        assert (chosen[i], rejected[i], log_z[i]) == pytest.approx(want, abs=1e-5)


def test_a_stronger_reference_is_a_smaller_beta():
    """Where the reference in the loss is itself pi* for b, the loss with beta asks for pi* at
    1/(1/b + 1/beta). 1e-12."""
    ref, reward = tabular.random_world(20)
    for b, beta in ((1.0, 4.0), (0.1, 1.0)):
        near = world.optimal_policy(ref, reward, b)
        assert_same(world.optimal_policy(near, reward, beta),
                    world.optimal_policy(ref, reward, 1 / (1 / b + 1 / beta)), 1e-12,
                    {"the two betas are added": world.optimal_policy(ref, reward, b + beta)},
                    what="log pi")


# ---- AIHF

def test_the_joint_loss_by_hand_and_at_its_ends():
    """Two pairs and one demonstration. With weight 0 its gradient is that of DPO, with a large
    weight it points where maximum likelihood points. 1e-12, the direction 1e-6."""
    losses, logps = vector(0.5, 1.5), vector(-3.0)
    assert aihf.joint_loss(losses, logps) == pytest.approx((0.5 + 1.5 + 3.0) / 3, abs=1e-12)
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def gradient(value):
        return torch.autograd.grad(value, theta)[0]

    def parts():
        p = theta.log_softmax(0)
        return dpo_loss(p[:2], p[2:4], vector(-1, -2), vector(-2, -1), 0.7)[0], p[4:]
    losses, logps = parts()
    dpo, sft = gradient(losses.mean()), gradient(-parts()[1].mean())
    assert_same(gradient(aihf.joint_loss(*parts(), weight=0.0)) * 3 / 2, dpo, 1e-12,
                {"the sign is flipped": -dpo}, what="weight 0")
    far = gradient(aihf.joint_loss(*parts(), weight=1e9))
    assert_same(far / far.norm(), sft / sft.norm(), 1e-6, {
        "the sign is flipped": -sft / sft.norm()}, what="a large weight")


def test_both_kinds_of_data_agree_on_the_optimum():
    """All pairs of the reference, exact labels, and demonstrations of pi*: the joint loss has no
    gradient at pi*, 1e-12. With the reference's own texts it has."""
    ref, reward = tabular.random_world(12)
    star = world.optimal_policy(ref, reward, 0.8)

    def slope(expert, weight):
        theta = star.clone().requires_grad_()
        logps = theta.log_softmax(0)
        pairs = tabular.population_loss(logps, ref, tabular.preferences(reward), 0.8)
        shown = (expert.exp() * logps).sum()
        loss = aihf.joint_loss(pairs[None], shown[None], weight)
        return torch.autograd.grad(loss, theta)[0].abs().max().item()
    for weight in (0.0, 0.3, 5.0):
        assert slope(star, weight) < 1e-12
    assert slope(ref, 0.3) > 1e-3


def test_the_first_gradient_of_joint_training(run, tmp_path, monkeypatch):
    """A batch of both kinds: Eq. 7 of its pairs, -log pi of its demonstrations, each datum once,
    and the stray mass of its pairs. At the start the policy is the reference. 1e-4."""
    texts = aihf.draw_demonstrations(run, "corpus", 64)
    pairs = systems_training.known(run)
    got, indices = first_gradient(run, tmp_path, monkeypatch, aihf, lambda: (
        aihf.fit_joint(run, tmp_path, pairs, texts)))
    own = [pairs.examples[i] for i in indices if i < 64]
    shown = [texts[i - 64] for i in indices if i >= 64]
    assert own and shown and len(own) + len(shown) == 16
    policy = copy.deepcopy(run.reference).requires_grad_(True)
    likelihood = sums_by_hand(policy, [data.Example(x, y, y) for x, y in shown])[:len(shown)]
    loss = (len(own) * dpo_by_hand(sums_by_hand(policy, own), sums_by_hand(run.reference, own), 1.0)
            - likelihood.sum() + len(own) * stray_by_hand(policy, run.reference, own)) / 16
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    assert_same(got / want.abs().max(), want / want.abs().max(), 1e-4, what="the gradient")


def test_demonstrations_come_from_whom_they_should(run, monkeypatch):
    """Their mean reward is the expectation under pi*, and under the grammar, to 4 standard errors.
    They are those two policies' own prompts in turn, and end in EOS."""
    prompts = run.train_prompts
    grammar, r = world.grammar_logps(prompts), world.rewards(prompts, world.responses())
    monkeypatch.setattr(evaluate, "exact_logps", lambda model, prompts: grammar)
    star = world.optimal_policy(grammar, r, 1.0)
    score = by_text(world.true_reward)
    for expert, logps in (("optimum", star), ("corpus", grammar)):
        texts = aihf.draw_demonstrations(run, expert, 2400)
        assert [x for x, _ in texts[:24]] == run.prompt_ids
        assert all(y[-1] == TOKENIZER.eot_token for _, y in texts)
        found = score(*zip(*texts)).double()  # (n,)
        want, error = world.expected(logps, r).mean(), found.std() / math.sqrt(2400)
        assert abs(found.mean() - want) < 4 * error


def test_few_data_are_passed_over_more_often():
    assert aihf.epochs_for(10_000, 64) == aihf.PASSES
    assert aihf.epochs_for(500, 64) * 500 / 64 == pytest.approx(aihf.LEAST, rel=0.1)


# ---- MDPO

def bandit(theta, old, advantages, t):
    """mirror_loss of a bandit whose every action was drawn once: old is uniform."""
    now, n = theta.log_softmax(0), len(theta)
    divergence = (now.exp() * (now - old)).sum().expand(n, 1)
    mask = torch.ones(n, 1, dtype=torch.bool)
    return mdpo.mirror_loss(now[:, None], old[:, None], advantages[:, None], divergence, mask, t)


def test_the_mirror_loss_is_least_at_the_mirror_step():
    """The policy proportional to pi_k exp(t A), claim 36, by LBFGS: 1e-6."""
    old = torch.full((6,), -math.log(6), dtype=torch.float64)
    advantages = torch.randn(6, dtype=torch.float64)
    for t in (0.3, 2.0):
        theta = tabular.minimise(lambda theta: bandit(theta, old, advantages, t), old)
        assert_same(theta.log_softmax(0), tabular.mirror_step(old, advantages, t), 1e-6,
                    {"1/t in the place of t": tabular.mirror_step(old, advantages, 1 / t),
                     "the sign of A": tabular.mirror_step(old, -advantages, t)}, what="log pi")


def test_the_first_mirror_step_is_the_policy_gradient():
    """Claim 38: at pi_k the divergence has no gradient, whatever t. 1e-12."""
    old = torch.full((6,), -math.log(6), dtype=torch.float64)
    advantages = torch.randn(6, dtype=torch.float64)
    p, want = old.exp(), []
    for i in range(6):  # d/dtheta_i of -sum_a p_a A_a
        want.append(-p[i] * (advantages[i] - (p * advantages).sum()))
    for t in (0.1, 10.0):
        theta = old.clone().requires_grad_()
        got = torch.autograd.grad(bandit(theta, old, advantages, t), theta)[0]
        assert_same(got, torch.stack(want), 1e-12, {"the sign": -torch.stack(want)},
                    what="the gradient")


def test_without_a_leash_it_is_reinforce_without_a_clip(run):
    """t = 1e12: the same samples, minibatches and steps as rlhf.learn without critic and clip. The
    weights agree to 1e-4. A small t keeps the policy near."""
    def trained(learner, **settings):
        policy = run.new_policy()
        learner(policy, run.reference, lambda x, y: torch.tensor([float(len(z)) for z in y]),
                run.prompt_ids, **settings)
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    def mirror(t):
        return trained(mdpo.learn, beta=1.0, samples=512, t=t, seed=3)
    start = torch.cat([p.flatten() for p in run.reference.parameters()])
    want = trained(learn, settings=Settings(samples=512, critic=False, clip=None), seed=3)
    assert (want - start).abs().max() > 1e-3
    assert_same(mirror(1e12), want, 1e-4, {"nothing is learned": start}, what="the weights")
    assert (mirror(1e-3) - start).norm() < 0.9 * (want - start).norm()


# ---- Measuring, and what is printed

def test_the_correlation_counts_an_entry_as_often_as_it_weighs():
    a, b, weight = vector(1, 2, 4, -1), vector(0, 3, 2, 5), torch.tensor([1, 3, 2, 0])
    want = torch.corrcoef(torch.stack([x.repeat_interleave(weight) for x in (a, b)]))[0, 1]
    assert systems.correlation(a, b, weight.double()) == pytest.approx(want.item(), abs=1e-12)


def test_the_optimum_has_every_measure_at_1(run, monkeypatch):
    """J/J*, the share and the credit of pi* are 1, to 1e-6. Of pi* at beta = 0.5, J is lower at the
    run's beta, and 1 at its own."""
    def row(beta):
        star = world.optimal_policy(run.ref_logps, evaluate.held_out_rewards(), beta)
        monkeypatch.setattr(evaluate, "exact_logps", lambda model, prompts: star)
        return systems.measured(run, None, beta)
    for column in ("of_optimum", "of_own", "captured", "credit", "wellformed"):
        assert row(1.0)[column] == pytest.approx(1, abs=1e-6), column
    half = row(0.5)
    assert half["of_own"] == pytest.approx(1, abs=1e-6) and half["of_optimum"] < 0.95
    assert half["captured"] == pytest.approx(1, abs=1e-6)


def test_pieces_have_names_of_their_own_and_what_they_need():
    names = [piece.name for piece in systems.pieces()]
    assert len(set(names)) == len(names)
    for piece in systems.pieces():
        assert all(name in names for name in piece.needs)
        assert ("far" in piece.name) == bool(piece.needs)


def test_what_is_gathered_and_printed(tmp_path, monkeypatch):
    """Two runs. The last piece is done on one of them alone, and does not count."""
    pieces = [work.Piece(f"systems/{name}", None)
              for name in ("reference/one", "bmc/weights", "bmc/late")]
    monkeypatch.setattr(systems, "pieces", lambda: pieces)
    for name, kl in (("one", 0.5), ("two", 1.0)):
        for piece, row in (("reference/one", {systems.DEFAULT: {"kl": kl, "of_optimum": 0.9}}),
                           ("bmc/weights", {"weights": {"kl": 2.0}})):
            write_json(row, tmp_path / name / "systems" / piece / "result.json")
    write_json({"late": {"kl": 3.0}}, tmp_path / "one" / "systems" / "bmc" / "late" / "result.json")
    found = systems.gather([tmp_path / "one", tmp_path / "two"])
    assert found == {"reference": {systems.DEFAULT: {"kl": [0.5, 1.0], "of_optimum": [0.9, 0.9]}},
                     "bmc": {"weights": {"kl": [2.0, 2.0]}}}
    table = systems.table_of(found, "bmc")
    assert "| DPO (the default run) |  | 0.750 ± 0.250 | 90.0 ± 0.0 |" in table[2]
    assert "| weights |  | 2.000 ± 0.000 |" in table[3]


# ---- The page

def test_the_tables_of_the_page_are_those_of_the_recorded_runs():
    """Every line of every table, from docs/systems.json, three seeds."""
    recorded = json.loads((ROOT / "docs" / "systems.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8").splitlines()
    assert recorded["seeds"] == [0, 1, 2]
    for group in recorded["rows"]:
        for line in systems.table_of(recorded["rows"], group):
            assert line in page, line
