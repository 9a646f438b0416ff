"""rlhf.py: the reward model, what a scoring function returns, the loop of policy learning and its switches, and the command."""
import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import data
import evaluate
import rlhf
import tabular
import world
from conftest import ROOT
from model import GPT, GPTConfig
from tools import assert_same, vector


@pytest.fixture
def toy():
    """An untrained GPT that reads the toy world, and four prompts in tokens."""
    torch.manual_seed(1)
    tokenizer = data.get_tokenizer("toy")
    gpt = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=32)).eval()
    return gpt, tokenizer, [tokenizer.encode_ordinary(x) for x in world.prompts()[0][:4]]


# ---- The reward model

@pytest.mark.parametrize("read", ["tokens", "end"])
def test_a_reward_model_starts_at_ln_2_and_does_not_see_padding(toy, read):
    """Before training every score is 0 and the loss ln 2, as DPO's is. After, a score depends on prompt and response alone: not
    on what stands beside them in the batch (1e-5), and gradients reach every weight but the unused positions'."""
    gpt, tokenizer, prompts = toy
    model = rlhf.RewardModel(gpt, read)
    responses = [tokenizer.encode_ordinary(y) + [tokenizer.eot_token] for y in (world.responses()[5], world.responses()[-1])]
    tokens, mask = data.pad(prompts[:2], responses)
    assert_same(model(tokens, mask), torch.zeros(2), 0, what="the first scores")
    assert_same(rlhf.reward_model_loss(model(tokens, mask), torch.zeros(2)), torch.full((2,), math.log(2)), 1e-6, what="the first loss")
    torch.nn.init.normal_(model.scalar.weight)
    alone = torch.cat([model(*data.pad([x], [y])) for x, y in zip(prompts, responses)])
    assert_same(model(*data.pad(prompts[:2], responses)), alone, 1e-5, {"padding is read": model.scalar(model.body.hidden(tokens))[:, -1, 0]},
                what="the scores of a batch")
    values = rlhf.ScalarModel.forward(model, tokens)                                                  # (2, T)
    want = torch.stack([v[len(x) + len(y) - 1] if read == "end" else v[len(x):len(x) + len(y)].sum()
                        for v, x, y in zip(values, prompts, responses)])
    assert_same(model(tokens, mask), want, 1e-5, {"the prompt is counted": values.sum(1), "EOS is left out": want - values[:, -1]},
                what=f"what is read ({read})")
    model(tokens, mask).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert gpt.wte.weight.data_ptr() != model.body.wte.weight.data_ptr(), "the reward model must have its own weights"


def test_a_reward_model_learns_from_labels_and_is_centred(toy, tmp_path):
    """From 1,500 pairs of faint colour to better than chance by far: accuracy above 60% on prompts never seen (0.5 by chance); the
    scores of its pairs have mean 0 (1e-4), and it comes back frozen."""
    gpt, tokenizer, _ = toy
    examples, _ = data.tokenize(data.make_preferences(1500, "human", 0), tokenizer)
    model = rlhf.train_reward_model(gpt, examples, tmp_path, seed=0, epochs=6, lr=4e-3)
    assert abs(torch.cat([model(b["tokens"], b["response_mask"]) for b in (data.collate(examples[i:i + 100]) for i in range(0, 1500, 100))]).mean()) < 1e-4
    assert not any(p.requires_grad for p in model.parameters())
    held_out = world.prompts()[1][:2]
    quality = rlhf.judge_quality(rlhf.all_scores(model, held_out), held_out)
    assert 0.6 < quality["accuracy"] < quality["ceiling"]


def test_the_measures_of_a_judge():
    """accuracy: of the true reward it is the label ceiling, of its negative 1 minus that, of nothing 1/2, and any judge's is the
    sum over all pairs, written out. calibration: the true reward is right in every bin (1e-12). spearman: 1, -1, 0.8 by hand, and
    ties share a rank."""
    p, reward = torch.log_softmax(torch.randn(6).double(), -1), vector(0.3, -1, 2, 2, 0.1, -0.5)
    ceiling = world.label_ceiling(p, reward)
    scores = vector(1, 0, 0, 3, -1, 0.5)
    by_hand = sum(p[i].exp() * p[j].exp() * (torch.sigmoid(reward[i] - reward[j]) * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
                                             + torch.sigmoid(reward[j] - reward[i]) * (1.0 if scores[j] > scores[i] else 0.5 if scores[i] == scores[j] else 0.0))
                  for i in range(6) for j in range(6))
    assert_same(rlhf.accuracy(p, scores, reward), by_hand, 1e-12, what="a judge's accuracy")
    assert_same(rlhf.accuracy(p, reward, reward), ceiling, 1e-12, what="the true reward's accuracy")
    assert_same(rlhf.accuracy(p, -reward, reward), 1 - ceiling, 1e-12, what="its opposite's")
    assert_same(rlhf.accuracy(p, torch.zeros(6).double(), reward), vector(0.5)[0], 1e-12, what="an indifferent judge's")
    predicted, true, share = rlhf.calibration(p, reward, reward)
    assert_same(predicted.nan_to_num(), true.nan_to_num(), 1e-12, what="the true reward's calibration")
    assert_same(share.sum(), vector(1.0)[0], 1e-12, what="the shares")
    predicted, true, _ = rlhf.calibration(p, 3 * reward, reward)
    assert (predicted - true).abs().nan_to_num().max() > 0.05, "a judge three times too sure is not calibrated"
    assert rlhf.spearman(vector(1, 2, 3, 4), vector(10, 20, 30, 99)).item() == pytest.approx(1)
    assert rlhf.spearman(vector(1, 2, 3, 4), vector(4, 3, 2, 1)).item() == pytest.approx(-1)
    assert rlhf.spearman(vector(1, 2, 3, 4), vector(1, 3, 2, 4)).item() == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rlhf.spearman(vector(1, 1, 2, 3), vector(5, 5, 6, 7)).item() == pytest.approx(1)


# ---- Scores

def test_a_response_that_did_not_end_scores_low_whoever_judges(toy):
    gpt, tokenizer, prompts = toy
    review = tokenizer.encode_ordinary(world.responses()[7])
    model = rlhf.RewardModel(gpt)
    torch.nn.init.constant_(model.scalar.bias, 1.0)
    for score, want in ((rlhf.by_text(world.true_reward), world.true_reward(world.prompts()[0][0], world.responses()[7])),
                        (rlhf.by_model(model), len(review) + 1.0)):
        ended, cut = score(prompts[:1] * 2, [review + [tokenizer.eot_token], review]).tolist()
        assert ended == pytest.approx(want, abs=1e-5) and cut == rlhf.UNFINISHED


def test_value_loss_and_its_clip_by_hand():
    """(1 - 3)^2 and (2 - 2)^2 halved and averaged; with clip 0.5 the first value, which came from 0, may profit up to 0.5 only:
    (0.5 - 3)^2. Outside the mask nothing counts."""
    values, old, returns = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[3.0, 2.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    assert_same(rlhf.value_loss(values, old, returns, mask), 0.5 * (4 + 0) / 2, 1e-6, {"the half is missing": 2.0}, what="the critic's loss")
    assert_same(rlhf.value_loss(values, old, returns, mask, clip=0.5), 0.5 * (6.25 + 0) / 2, 1e-6, {"not clipped": 1.0}, what="clipped")


def test_normalised_advantages():
    x, mask = torch.randn(5, 7).double() * 3 + 2, torch.rand(5, 7) < 0.6
    out = rlhf.normalise(x, mask)
    assert_same(out[mask].mean(), 0.0, 1e-9, what="the mean")
    assert_same(out[mask].std(), 1.0, 1e-6, what="the deviation")
    assert not out[~mask].any()


# ---- The loop

SMALL = {"samples": 128, "batch_size": 64, "minibatch_size": 32, "epochs": 2}


def learned(toy, seed=0, **settings):
    gpt, _, prompts = toy
    policy = copy.deepcopy(gpt).requires_grad_(True)
    # any score that differs from text to text will do; the true reward of a random model's text is the same for all of it
    lively = lambda x, y: torch.tensor([sum(response) % 7 - 3.0 for response in y])
    history = rlhf.learn(policy, gpt.requires_grad_(False), lively, prompts, rlhf.Settings(**SMALL | settings), seed)
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), history


def test_policy_learning_generates_as_many_as_asked_and_leaves_the_reference_alone(toy, monkeypatch):
    """It is on-policy: every batch is generated anew, by the policy and never by the reference, which stays as it was."""
    gpt, generated = toy[0], []
    before, original = evaluate.fingerprint(gpt), GPT.generate

    def counting(self, prompts, *args, **kwargs):
        generated.append((self is gpt, len(prompts)))
        return original(self, prompts, *args, **kwargs)
    monkeypatch.setattr(GPT, "generate", counting)
    weights, history = learned(toy)
    assert generated == [(False, 64), (False, 64)] and [h["generated"] for h in history] == [64, 128]
    assert evaluate.fingerprint(gpt) == before
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6), "the first batch is the reference's own"
    monkeypatch.undo()
    again, _ = learned(toy)
    assert torch.equal(weights, again), "the same seed is the same run"
    assert not torch.equal(weights, learned(toy, seed=1)[0])


def test_a_frozen_policy_is_refused(toy):
    """With a critic that learns, a policy that does not would go unnoticed."""
    gpt, _, prompts = toy
    with pytest.raises(ValueError, match="requires_grad_"):
        rlhf.learn(copy.deepcopy(gpt.requires_grad_(False)), gpt, rlhf.by_text(world.true_reward), prompts, rlhf.Settings(**SMALL), 0)


@pytest.mark.parametrize("switch", [{"beta": 3.0}, {"critic": False}, {"lam": 0.5}, {"gamma": 0.9}, {"clip": None}, {"clip": 0.01}, {"normalise_advantages": False},
                                    {"clip_values": 0.01}, {"scale_rewards": True}, {"anneal_lr": False}, {"max_grad_norm": None},
                                    {"epochs": 1}, {"lr": 1e-4}, {"critic_lr": 1e-1}, {"minibatch_size": 64}, {"target_kl": 0.5}],
                         ids=lambda s: next(iter(s)))
def test_every_switch_is_wired(toy, switch):
    """A setting that changes nothing is not read. (Two batches of 64, three for the leash, which is steered after the first; the
    learning rate is high, so that ratios leave the clip.)"""
    settings = {"lr": 1e-2, "samples": 192 if "target_kl" in switch else 128}
    assert not torch.equal(learned(toy, **settings)[0], learned(toy, **settings | switch)[0])


def test_the_leash_is_steered_to_a_target_kl(toy):
    """beta falls while the KL is under its target and rises while it is over, by 2% a batch at the most (1909.08593)."""
    _, history = learned(toy, target_kl=1e3, samples=256)
    assert [h["beta"] for h in history] == pytest.approx([0.98 ** k for k in range(4)])
    _, history = learned(toy, target_kl=1e-4, samples=256, lr=1e-2)
    assert history[-1]["beta"] > history[1]["beta"]


def test_policy_learning_climbs_its_objective(toy):
    """From random weights, towards any score: here, short responses that end. E[score] rises from below -4 to above -2."""
    gpt, tokenizer, prompts = toy
    policy = copy.deepcopy(gpt)
    eager = lambda x, y: torch.tensor([0.0 if r[-1] == tokenizer.eot_token else -5.0 for r in y])
    history = rlhf.learn(policy, gpt.requires_grad_(False), eager, prompts, rlhf.Settings(samples=2560, batch_size=128, lr=3e-3, beta=0.01), 0)
    assert history[0]["score"] < -4 and history[-1]["score"] > -2, [h["score"] for h in history]


# ---- The baselines

def test_unlikelihood_and_preferred_ft_are_the_losses_they_say(toy, tmp_path):
    """The first logged loss of each, before any update, from response log-probabilities taken one by one (1e-4)."""
    gpt, tokenizer, _ = toy
    examples, _ = data.tokenize(data.make_preferences(8, "human", 0), tokenizer)
    w, l = (torch.stack([torch.log_softmax(gpt(torch.tensor([e.prompt + r]))[0, :-1], -1)[range(len(e.prompt) - 1, len(e.prompt) + len(r) - 1), r].sum()
                         for e, r in ((e, getattr(e, side)) for e in examples)]).mean().item() for side in ("chosen", "rejected"))
    for name, train_it, want in (("a", lambda p, f: rlhf.preferred_ft(p, examples, f, 0), -w),
                                 ("b", lambda p, f: rlhf.unlikelihood(p, examples, f, 0, alpha=0.3), -w + 0.3 * l)):
        (tmp_path / name).mkdir()
        policy = train_it(copy.deepcopy(gpt), tmp_path / name)
        assert evaluate.read_jsonl(tmp_path / name / "metrics.jsonl")[0]["loss"] == pytest.approx(want, abs=1e-3)
        assert evaluate.fingerprint(policy) != evaluate.fingerprint(gpt)


# ---- The command

def run_rlhf(*args):
    done = subprocess.run([sys.executable, "rlhf.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def compared(small_run, tmp_path_factory):
    """A finished `python rlhf.py DIR`, in small: 512 samples for each policy learning."""
    import shutil
    folder = tmp_path_factory.mktemp("rlhf") / "run"
    shutil.copytree(small_run, folder)
    code, out, err = run_rlhf(folder, "--samples", "512")
    assert code == 0, err[-3000:]
    return folder, out


def test_the_comparison_has_every_row_measured(compared):
    folder, out = compared
    result = json.loads((folder / "rlhf.json").read_text(encoding="utf-8"))
    assert set(result["rows"]) == set(rlhf.TITLES)
    for name, row in result["rows"].items():
        assert rlhf.TITLES[name] in out
        assert all(math.isfinite(row[k]) for k in ("reward", "kl", "objective", "wellformed", "objective_all", "seconds")), name
        assert row["labels"] == (256 if name.split("-")[-1] in ("human", "ai", "dpo", "plain", "ft", "unlikelihood", "16", "128", "learned") else 0), name
        assert row["generated"] == (512 if name.startswith(("ppo", "reinforce")) else int(name[8:]) if name.startswith("best") else 0), name
    assert (folder / "rlhf.png").stat().st_size > 20_000
    for who in ("human", "ai", "judge"):
        quality = result["reward_models"][who]
        assert 0 <= quality["accuracy"] <= quality["ceiling"] + 1e-12 and -1 <= quality["spearman"] <= 1
    assert result["rows"]["optimum"]["objective"] == pytest.approx(evaluate.optimum(
        evaluate.exact_logps(rlhf.Run(folder).reference, world.prompts()[1]), 1.0, 1.0)["objective"])


def test_no_method_is_above_the_frontier(compared):
    """The reward of every row, at its own KL, against the exact frontier there (1e-6): where all text counts alike nobody is better
    than pi*. And J of none is above pi*'s."""
    run = rlhf.Run(compared[0])
    rows = json.loads((run.folder / "rlhf.json").read_text(encoding="utf-8"))["rows"]
    ref, r = world.normalise(evaluate.exact_logps(run.reference, run.held_out)), evaluate.held_out_rewards()
    for name, row in rows.items():
        best = world.expected(world.optimal_policy(ref, r, world.beta_at_kl(ref, r, row["kl"])), r).mean().item()
        assert row["reward"] <= best + 1e-6, f"{name} is above the frontier by {row['reward'] - best:g}"
        assert row["objective"] <= rows["optimum"]["objective"] + 1e-9, name


def test_a_second_call_trains_nothing_and_other_settings_are_refused(compared):
    folder, out = compared
    times = {f: f.stat().st_mtime for f in (folder / "rlhf").rglob("*.pt")}
    assert len(times) == len(rlhf.STAGES)
    code, again, _ = run_rlhf(folder, "--samples", "512")
    assert code == 0 and times == {f: f.stat().st_mtime for f in times}
    assert again.split("Done in")[0] == out.split("Done in")[0], "the same figures and the same samples"
    code, _, err = run_rlhf(folder, "--samples", "1024")
    assert code != 0 and "remove that folder" in err and "Traceback" not in err
    file = folder / "rlhf" / "settings.json"               # stages of a reader who has since changed a default in Settings
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(known | {"lr": 0.5}), encoding="utf-8")
    code, _, err = run_rlhf(folder, "--samples", "512")
    file.write_text(json.dumps(known), encoding="utf-8")
    assert code != 0 and f"lr = 0.5, not {rlhf.Settings.lr}" in err and "clip" not in err


@pytest.mark.parametrize("flags, message", [({"annotator": "ai"}, "human labels"), ({"data": "pairs.jsonl"}, "toy world")])
def test_a_run_that_cannot_be_compared_is_refused(small_run, tmp_path, flags, message):
    import shutil
    shutil.copytree(small_run, tmp_path / "run")
    known = json.loads((tmp_path / "run" / "flags.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "flags.json").write_text(json.dumps(known | flags), encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        rlhf.Run(tmp_path / "run")
    with pytest.raises(SystemExit, match="no finished run"):
        rlhf.Run(tmp_path)


def test_the_learned_rewards_optimum_is_exact_and_best_of_n_is_ranked_by_it(compared):
    """Two rows from their definitions: pi ~ ref exp(r_learned/beta), measured with r*; best of 16 of the reference by r_learned."""
    run = rlhf.Run(compared[0])
    rows = json.loads((run.folder / "rlhf.json").read_text(encoding="utf-8"))["rows"]
    ref, r = world.normalise(evaluate.exact_logps(run.reference, run.held_out)), evaluate.held_out_rewards()
    learned = rlhf.all_scores(run.reward_model("reward-human"), run.held_out)
    tilted = torch.softmax(ref + learned / run.beta, -1)
    assert rows["optimum-learned"]["reward"] == pytest.approx((tilted * r).sum(-1).mean().item(), abs=1e-9)
    best = torch.stack([tabular.best_of_n(q, s, 16).exp() for q, s in zip(ref, learned)])
    assert rows["best-of-16"]["reward"] == pytest.approx((best * r).sum(-1).mean().item(), abs=1e-9)
