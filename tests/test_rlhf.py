"""rlhf.py: what a scoring function returns, what policy learning refuses, whether both steps learn,
and the command `python rlhf.py DIR`. Each step itself is done by hand in test_steps.py."""
import contextlib
import copy
import io
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import lru_cache

import pytest
import torch

import data
import evaluate
import rlhf
import world
from conftest import ROOT
from lab.judges import all_scores, by_text, judge_quality
from model import GPT, GPTConfig
from support.checkpoints import fingerprint, load_model, save_model
from support.files import append_jsonl, read_json, read_jsonl, write_json
from support.run import Run, load_run, load_toy_run

pytestmark = pytest.mark.slow


@pytest.fixture
def toy():
    """An untrained GPT that reads the toy world, the tokenizer, and four prompts in tokens."""
    torch.manual_seed(1)
    tokenizer = data.get_tokenizer("toy")
    gpt = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1,
                        n_embd=32)).eval()
    return gpt, tokenizer, [tokenizer.encode_ordinary(x) for x in world.prompts()[0][:4]]


# ---- Scores

def test_a_response_that_did_not_end_scores_low_whoever_judges(toy):
    """A judge of texts gets the texts, without EOS, and each of them once: it may be slow."""
    gpt, tokenizer, prompts = toy
    prompt, text = world.prompts()[0][0], world.responses()[7]
    review = tokenizer.encode_ordinary(text)
    model = rlhf.RewardModel(gpt)
    torch.nn.init.constant_(model.scalar.bias, 1.0)  # the score is the number of tokens
    asked = []

    def judge(prompt, text):
        asked.append((prompt, text))
        return world.true_reward(prompt, text)
    judges = [(by_text(judge), world.true_reward(prompt, text)),
              (rlhf.by_model(model), len(review) + 1.0)]
    for score, want in judges:
        responses = [review + [tokenizer.eot_token], review, review + [tokenizer.eot_token]]
        ended, cut, again = score([prompts[0]] * 3, responses).tolist()
        assert ended == again == pytest.approx(want, abs=1e-5) and cut == rlhf.UNFINISHED
    assert asked == [(prompt, text)]


def test_the_shift_of_the_scores_costs_no_more_than_4096_pairs(toy, tmp_path, monkeypatch):
    """All scores are computed at once. More pairs than these would take much memory."""
    asked, collate = [], data.collate

    def counting(examples, **kwargs):
        asked.append(len(examples))
        return collate(examples[:1], **kwargs)
    monkeypatch.setattr(data, "collate", counting)
    pairs = [data.Example([1], [2], [3])] * 4097
    for n, read in (4097, 4096), (4096, 4096), (5, 5):
        rlhf.train_reward_model(toy[0], pairs[:n], Run(tmp_path), 0, epochs=0)
        assert asked.pop() == read and not asked


# ---- The loop

def test_a_frozen_policy_is_refused(toy):
    """The critic would learn all the same. So nobody would notice that the policy does not, or
    that a part of it does not."""
    gpt, _, prompts = toy
    policy = copy.deepcopy(gpt)
    score, settings = by_text(world.true_reward), rlhf.Settings(samples=4, batch_size=4)
    for frozen in (policy.wpe, policy):
        frozen.requires_grad_(False)
        with pytest.raises(ValueError, match="requires_grad_"):
            rlhf.learn(policy, gpt, score, prompts, settings)


def test_fewer_samples_than_a_batch_are_refused(toy):
    gpt, _, prompts = toy
    score = by_text(world.true_reward)
    with pytest.raises(ValueError, match="samples=3 is less than one batch"):
        rlhf.learn(copy.deepcopy(gpt), gpt, score, prompts, rlhf.Settings(samples=3, batch_size=4))
    settings = rlhf.Settings(samples=4, batch_size=4)
    assert len(rlhf.learn(copy.deepcopy(gpt), gpt, score, prompts, settings)) == 1


def test_the_leash_is_steered_to_a_target_kl(toy, monkeypatch, capsys):
    """After each batch beta changes by a tenth of the KL's relative error, and by at most 2%
    (1909.08593). It falls while the KL is under its target and rises while it is over it. The
    progress bar shows it. The seed is 0 where none is given."""
    gpt, _, prompts = toy
    kls, betas, rollout = iter([1.0, 1.8, 2.3, 6.0, 2.0]), [], rlhf.rollout

    def with_kl(*args):
        betas.append(args[-1])
        return rollout(*args) | {"kl": torch.full((4,), next(kls))}
    monkeypatch.setattr(rlhf, "rollout", with_kl)
    score = by_text(world.true_reward)
    settings = rlhf.Settings(samples=20, batch_size=4, beta=0.4, target_kl=2.0)
    history = rlhf.learn(copy.deepcopy(gpt), gpt, score, prompts, settings)
    assert torch.initial_seed() == 0
    want = [0.4, 0.4 * 0.98, 0.4 * 0.98 * 0.99, 0.4 * 0.98 * 0.99 * 1.015]
    want.append(want[-1] * 1.02)
    assert betas == [row["beta"] for row in history] == pytest.approx(want, rel=1e-6)
    assert f"kl=2.000, beta={want[-1]:.3f}" in capsys.readouterr().err


# ---- The command

FLAGS = {"data": None, "annotator": "human", "tokenizer": "toy", "seed": 3, "beta": 0.7,
         "pairs": 96}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that looks finished. Its two models are untrained, which takes no time.
    A small Gaussian was added to the reference's weights, and this is called DPO."""
    torch.manual_seed(0)
    vocab = data.get_tokenizer("toy").n_vocab
    sft = GPT(GPTConfig(block_size=64, vocab_size=vocab, n_layer=1, n_head=1, n_embd=16))
    dpo = copy.deepcopy(sft)
    for p in dpo.parameters():
        p.data += 0.1 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("rlhf") / "run"
    folder.mkdir()
    save_model(sft, folder / "sft.pt")
    save_model(dpo, folder / "dpo.pt", reference=fingerprint(sft))
    write_json(FLAGS, folder / "flags.json")
    return folder


@pytest.fixture(scope="module")
def learned(finished, tmp_path_factory):
    """A copy of it after `python rlhf.py DIR --samples 512`, and what was printed. An interrupted
    command had left some lines of metrics there."""
    folder, printed = tmp_path_factory.mktemp("rlhf") / "run", io.StringIO()
    shutil.copytree(finished, folder)
    (folder / "ppo").mkdir()
    append_jsonl({"stage": "reward", "step": 0, "loss": 9.0}, folder / "ppo" / "metrics.jsonl")
    with contextlib.redirect_stdout(printed):
        rlhf.main([str(folder), "--samples", "512"])
    return folder, printed.getvalue()


def contents(folder):
    return {file.relative_to(folder): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}


@lru_cache(maxsize=None)
def measured(folder):
    """The rows of the command's table, measured again from the files: {first word: measure}."""
    _, _, models = load_run(folder)
    models["ppo"], _ = load_model(folder / "ppo" / "policy.pt")
    beta, held_out = FLAGS["beta"], world.prompts()[1]
    ref = evaluate.exact_logps(models["sft"], held_out)
    rows = {"optimum": evaluate.optimum(ref, beta, beta)}
    for title, name in (("reference", "sft"), ("DPO", "dpo"), ("PPO", "ppo")):
        logps = evaluate.exact_logps(models[name], held_out)
        rows[title] = evaluate.measure(logps, ref, beta)
    return rows


def test_the_command_prints_the_four_side_by_side(learned):
    """Reference, DPO, RLHF and optimum, in this order. Each line has the numbers of its policy,
    measured again from the files that were written. Then come answers to a held-out prompt."""
    folder, out = learned
    rows = measured(folder)
    table, answers, done = out.strip().split("\n\n")
    lines = table.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["reference", "DPO", "PPO", "optimum"]
    for line in lines:
        row = rows[line.split()[0]]
        assert line.split()[-6:] == [
            f"{row['reward']:.3f}", f"{row['kl']:.3f}", f"{row['objective']:.3f}",
            f"{row['win_rate']:.1%}", f"{row['wellformed']:.1%}", f"{row['objective_all']:.3f}"]
    title, names = answers.splitlines()[:2]
    assert title == f"{world.prompts()[1][2]!r}, with their true rewards"
    assert names.split() == ["reference", "DPO", "PPO"]
    assert done.startswith("Done in ") and str(folder / "ppo" / "policy.pt") in done


def test_the_learned_policy_is_not_above_the_frontier(learned):
    """Its reward is at most the best reward at its KL (1e-6), and its J at most that of pi*."""
    folder, _ = learned
    rows = measured(folder)
    _, _, models = load_run(folder)
    ref = world.normalise(evaluate.exact_logps(models["sft"], world.prompts()[1]))
    r = evaluate.held_out_rewards()
    row = rows["PPO"]
    star = world.optimal_policy(ref, r, world.beta_at_kl(ref, r, row["kl"]))
    assert row["reward"] <= world.expected(star, r).mean().item() + 1e-6
    assert row["objective"] <= rows["optimum"]["objective"] + 1e-9
    assert row["kl"] > 1e-4, "the policy has not moved"


# The defaults of train_reward_model and of rlhf.Settings. The published numbers come from them.
REWARD_MODEL = {"epochs": 4, "lr": 1.5e-3, "batch_size": 64, "read": "tokens"}
SETTINGS = {"beta": 1.0, "target_kl": None, "samples": 40_960, "batch_size": 512,
            "minibatch_size": 64, "epochs": 2, "lr": 2e-3, "critic": True, "critic_lr": 3e-3,
            "gamma": 1.0, "lam": 1.0, "clip": 0.1, "normalise_advantages": True,
            "clip_values": None, "scale_rewards": False, "anneal_lr": True, "max_grad_norm": 1.0}


def test_the_command_is_its_two_steps_with_the_settings_of_the_published_numbers(
        finished, learned, tmp_path):
    """The reward model and the policy are learned once more, from the run's own pairs, seed and
    beta. The policy has the same weights, and the metrics have the same lines, each step once.
    The files of the run itself stay as they were."""
    folder, _ = learned
    assert asdict(rlhf.Settings()) == SETTINGS
    reference, tokenizer = load_model(finished / "sft.pt")[0].eval(), data.get_tokenizer("toy")
    examples, _ = data.tokenize(data.make_preferences(96, "human", 3), tokenizer)
    reward_model = rlhf.train_reward_model(reference, examples, Run(tmp_path), 3, **REWARD_MODEL)
    settings = SETTINGS | {"beta": 0.7, "samples": 512}
    policy = copy.deepcopy(reference)
    prompts = [tokenizer.encode_ordinary(x) for x in world.prompts()[0]]
    rlhf.learn(policy, reference, rlhf.by_model(reward_model), prompts, rlhf.Settings(**settings),
               seed=3)
    learned_policy, facts = load_model(folder / "ppo" / "policy.pt")
    assert fingerprint(learned_policy) == fingerprint(policy) != fingerprint(reference)
    assert facts == {"settings": settings, "reference": fingerprint(reference),
                     "torch": str(torch.__version__)}
    runs = [read_jsonl(place / "metrics.jsonl") for place in (folder / "ppo", tmp_path)]
    for got, want in zip(*runs, strict=True):
        assert got | {"pairs_per_second": 0} == want | {"pairs_per_second": 0}
    before, after = contents(finished), contents(folder)
    assert {os.path.join("ppo", "policy.pt"), os.path.join("ppo", "metrics.jsonl")} == {
        str(file) for file in after.keys() - before.keys()}
    assert all(after[file] == before[file] for file in before)


def test_only_the_policy_can_learn(finished, tmp_path, monkeypatch):
    """The command hands a frozen reference to both steps, and a policy that is not frozen."""
    def look(policy, reference, *args):
        assert not any(p.requires_grad for p in reference.parameters())
        assert all(p.requires_grad for p in policy.parameters())
        raise StopIteration
    monkeypatch.setattr(rlhf, "learn", look)
    monkeypatch.setattr(rlhf, "train_reward_model", lambda *args: rlhf.RewardModel(args[0]))
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(StopIteration):
        rlhf.main([str(tmp_path / "run")])


@pytest.mark.parametrize("flags, message", [
    ({"annotator": "ai"}, "--annotator ai.*human labels"),
    ({"annotator": "length"}, "--annotator length.*human labels"),
    ({"data": "pairs.jsonl"}, "--data.*toy world"),
])
def test_a_run_without_a_known_optimum_is_refused(finished, tmp_path, flags, message):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    write_json(read_json(folder / "flags.json") | flags, folder / "flags.json")
    with pytest.raises(SystemExit, match=message):
        rlhf.main([str(folder), "--samples", "512"])
    assert not (folder / "ppo").exists()
    with pytest.raises(SystemExit, match=message):
        load_toy_run(folder)
    with pytest.raises(SystemExit, match="no finished run"):
        rlhf.main([str(tmp_path)])


def test_too_few_samples_are_refused_before_anything_is_trained(finished, capsys):
    with pytest.raises(SystemExit):
        rlhf.main([str(finished), "--samples", "511"])
    assert "--samples: 511 must be at least 512" in capsys.readouterr().err
    assert not (finished / "ppo").exists()


def test_a_learned_policy_is_not_overwritten(learned):
    """`python rlhf.py DIR`, as a program: it ends with a message and changes nothing."""
    folder, _ = learned
    before = contents(folder)
    done = subprocess.run([sys.executable, "rlhf.py", str(folder)], cwd=ROOT, capture_output=True,
                          text=True, encoding="utf-8")
    assert done.returncode == 1 and "not overwritten" in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr and contents(folder) == before


# ---- Does it learn?

def test_a_reward_model_learns_from_labels(toy, tmp_path):
    """An untrained model learns from 1,500 pairs. Its accuracy on prompts that it has never seen
    is above 60%; by chance it is 50%."""
    gpt, tokenizer, _ = toy
    examples, _ = data.tokenize(data.make_preferences(1500, "human", 0), tokenizer)
    model = rlhf.train_reward_model(gpt, examples, Run(tmp_path), seed=0, epochs=6, lr=4e-3)
    held_out = world.prompts()[1][:2]
    quality = judge_quality(all_scores(model, held_out), held_out)
    assert 0.6 < quality["accuracy"] < quality["ceiling"]


def test_policy_learning_climbs_its_objective(toy):
    """From random weights towards a score that asks only for an end: E[score] rises from below -4
    to above -2."""
    gpt, tokenizer, prompts = toy

    def eager(prompts, responses):
        ended = [response[-1] == tokenizer.eot_token for response in responses]
        return torch.where(torch.tensor(ended), 0.0, -5.0)
    policy, reference = copy.deepcopy(gpt), gpt.requires_grad_(False)
    settings = rlhf.Settings(samples=2560, batch_size=128, lr=3e-3, beta=0.01)
    history = rlhf.learn(policy, reference, eager, prompts, settings, 0)
    scores = [row["score"] for row in history]
    assert scores[0] < -4 and scores[-1] > -2, scores
