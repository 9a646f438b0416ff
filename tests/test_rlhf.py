"""rlhf.py: the reward model, what a scoring function returns, the loop of policy learning and its
switches, and the command `python rlhf.py DIR`."""
import copy
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

import data
import evaluate
import ppo
import rlhf
import world
from conftest import ROOT
from lab.judges import all_scores, judge_quality
from model import GPT, GPTConfig
from support.checkpoints import fingerprint, load_model
from support.files import read_json, read_jsonl, write_json
from support.run import Run, load_run, load_toy_run
from tools import assert_same, vector


@pytest.fixture
def toy():
    """An untrained GPT that reads the toy world, the tokenizer, and four prompts in tokens."""
    torch.manual_seed(1)
    tokenizer = data.get_tokenizer("toy")
    gpt = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1,
                        n_embd=32)).eval()
    return gpt, tokenizer, [tokenizer.encode_ordinary(x) for x in world.prompts()[0][:4]]


# ---- The reward model

@pytest.mark.parametrize("read", ["tokens", "end"])
def test_a_reward_model_starts_at_ln_2_and_does_not_see_padding(toy, read):
    """Before training every score is 0 and the loss is ln 2, as DPO's is. After it a score depends
    on prompt and response alone, and not on what stands beside them in the batch (1e-5).
    Gradients reach every tensor."""
    gpt, tokenizer, prompts = toy
    prompts = prompts[:2]
    model = rlhf.RewardModel(gpt, read)
    responses = []
    for text in (world.responses()[5], world.responses()[-1]):
        responses.append(tokenizer.encode_ordinary(text) + [tokenizer.eot_token])
    tokens, mask = data.pad(prompts, responses)
    scores = model(tokens, mask)
    assert_same(scores, torch.zeros(2), 0, what="the first scores")
    losses = rlhf.reward_model_loss(scores, torch.zeros(2))
    assert_same(losses, torch.full((2,), math.log(2)), 1e-6, what="the first loss")

    torch.nn.init.normal_(model.scalar.weight)
    scores = model(tokens, mask)
    alone = torch.cat([model(*data.pad([x], [y])) for x, y in zip(prompts, responses)])
    at_the_end = model.scalar(model.body.hidden(tokens))[:, -1, 0]
    assert_same(scores, alone, 1e-5, {"padding is read": at_the_end},
                what="the scores of a batch")

    values = rlhf.ScalarModel.forward(model, tokens)  # (2, T)
    want = []
    for v, x, y in zip(values, prompts, responses):
        of_response = v[len(x):len(x) + len(y)]
        want.append(of_response[-1] if read == "end" else of_response.sum())
    want = torch.stack(want)
    assert_same(scores, want, 1e-5, {"the prompt is counted": values.sum(1),
                                     "EOS is left out": want - values[:, -1]},
                what=f"what is read ({read})")
    scores.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert gpt.wte.weight.data_ptr() != model.body.wte.weight.data_ptr(), \
        "the reward model must have its own weights"


def test_a_reward_model_learns_from_labels_and_is_centred(toy, tmp_path):
    """An untrained model learns from 1,500 pairs. Its accuracy on prompts that it has never seen
    is above 60%; by chance it is 50%. The scores of its pairs have mean 0 (1e-4). It comes back
    frozen."""
    gpt, tokenizer, _ = toy
    examples, _ = data.tokenize(data.make_preferences(1500, "human", 0), tokenizer)
    model = rlhf.train_reward_model(gpt, examples, Run(tmp_path), seed=0, epochs=6, lr=4e-3)
    scores = []
    for i in range(0, 1500, 100):
        batch = data.collate(examples[i:i + 100])
        scores.append(model(batch["tokens"], batch["response_mask"]))
    assert abs(torch.cat(scores).mean()) < 1e-4
    assert not any(p.requires_grad for p in model.parameters())
    held_out = world.prompts()[1][:2]
    quality = judge_quality(all_scores(model, held_out), held_out)
    assert 0.6 < quality["accuracy"] < quality["ceiling"]


# ---- Scores

def test_a_response_that_did_not_end_scores_low_whoever_judges(toy):
    gpt, tokenizer, prompts = toy
    prompt, text = world.prompts()[0][0], world.responses()[7]
    review = tokenizer.encode_ordinary(text)
    model = rlhf.RewardModel(gpt)
    torch.nn.init.constant_(model.scalar.bias, 1.0)  # the score is the number of tokens
    judges = [(rlhf.by_text(world.true_reward), world.true_reward(prompt, text)),
              (rlhf.by_model(model), len(review) + 1.0)]
    for score, want in judges:
        responses = [review + [tokenizer.eot_token], review]
        ended, cut = score([prompts[0], prompts[0]], responses).tolist()
        assert ended == pytest.approx(want, abs=1e-5) and cut == rlhf.UNFINISHED


def test_value_loss_and_its_clip_by_hand():
    """Without a clip: (1 - 3)^2 and (2 - 2)^2, halved and averaged. With clip 0.5 the first value,
    which came from 0, gains by moving to 0.5 only: (0.5 - 3)^2. Outside the mask nothing counts."""
    values = torch.tensor([[1.0, 2.0, 9.0]])
    old = torch.tensor([[0.0, 2.0, 0.0]])
    returns = torch.tensor([[3.0, 2.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    assert_same(ppo.value_loss(values, old, returns, mask), 0.5 * (4 + 0) / 2, 1e-6,
                {"the half is missing": 2.0}, what="the critic's loss")
    assert_same(ppo.value_loss(values, old, returns, mask, clip=0.5), 0.5 * (6.25 + 0) / 2, 1e-6,
                {"not clipped": 1.0}, what="the critic's clipped loss")


def test_normalised_advantages():
    x, mask = torch.randn(5, 7).double() * 3 + 2, torch.rand(5, 7) < 0.6
    out = ppo.normalise(x, mask)
    assert_same(out[mask].mean(), 0.0, 1e-9, what="the mean")
    assert_same(out[mask].std(), 1.0, 1e-6, what="the deviation")
    assert not out[~mask].any()


# ---- The loop

SMALL = {"samples": 128, "batch_size": 64, "minibatch_size": 32, "epochs": 2}


def lively(prompts, responses):
    """Any score that differs from text to text will do. The true reward of an untrained model's
    texts is the same for all of them."""
    return torch.tensor([sum(response) % 7 - 3.0 for response in responses])


def learned(toy, seed=0, **settings):
    """The weights of a policy that has learned from `lively`, in one vector, and the history."""
    gpt, _, prompts = toy
    policy = copy.deepcopy(gpt).requires_grad_(True)
    reference = gpt.requires_grad_(False)
    settings = rlhf.Settings(**SMALL | settings)
    history = rlhf.learn(policy, reference, lively, prompts, settings, seed)
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), history


def test_policy_learning_generates_as_many_as_asked_and_leaves_the_reference_alone(
        toy, monkeypatch):
    """It is on-policy: every batch is generated anew, by the policy and never by the reference.
    The reference stays as it was."""
    gpt, generated = toy[0], []
    before, original = fingerprint(gpt), GPT.generate

    def counting(self, prompts, *args, **kwargs):
        generated.append((self is gpt, len(prompts)))
        return original(self, prompts, *args, **kwargs)
    monkeypatch.setattr(GPT, "generate", counting)
    weights, history = learned(toy)
    assert generated == [(False, 64), (False, 64)]
    assert [row["generated"] for row in history] == [64, 128]
    assert fingerprint(gpt) == before
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6), "the first policy is the reference"
    monkeypatch.undo()
    again, _ = learned(toy)
    assert torch.equal(weights, again), "the same seed is the same run"
    assert not torch.equal(weights, learned(toy, seed=1)[0])


def test_response_token_logps_are_the_log_of_the_softmax(toy):
    """At each response token the log of the softmax of a whole forward (1e-5), elsewhere 0."""
    gpt, tokenizer, prompts = toy
    responses = [tokenizer.encode_ordinary(" dull.") + [tokenizer.eot_token],
                 tokenizer.encode_ordinary(" superb and scary.") + [tokenizer.eot_token]]
    tokens, mask = data.pad(prompts[:2], responses)
    mask = mask[:, 1:]
    logps = rlhf.response_token_logps(gpt, tokens, mask)
    for row, (x, y) in enumerate(zip(prompts, responses)):
        probabilities = gpt(torch.tensor([x + y]))[0].softmax(-1)
        want = torch.zeros(mask.size(1))
        for i, token in enumerate(y):
            position = len(x) + i - 1
            want[position] = probabilities[position, token].log()
        assert_same(logps[row], want, 1e-5, what=f"row {row}")
    assert_same(mask.sum(1).double(), vector(*map(len, responses)), 0, what="the mask")


def test_a_frozen_policy_is_refused(toy):
    """The critic would learn all the same. So nobody would notice that the policy does not."""
    gpt, _, prompts = toy
    policy = copy.deepcopy(gpt.requires_grad_(False))
    score, settings = rlhf.by_text(world.true_reward), rlhf.Settings(**SMALL)
    with pytest.raises(ValueError, match="requires_grad_"):
        rlhf.learn(policy, gpt, score, prompts, settings, 0)


def test_fewer_samples_than_a_batch_are_refused(toy):
    with pytest.raises(ValueError, match="samples=63 is less than one batch"):
        learned(toy, samples=63)


def name_of(switch):
    return next(iter(switch))


@pytest.mark.parametrize("switch", [
    {"beta": 3.0}, {"critic": False}, {"lam": 0.5}, {"gamma": 0.9}, {"clip": None},
    {"clip": 0.01}, {"normalise_advantages": False}, {"clip_values": 0.01},
    {"scale_rewards": True}, {"anneal_lr": False}, {"max_grad_norm": None}, {"epochs": 1},
    {"lr": 1e-4}, {"critic_lr": 1e-1}, {"minibatch_size": 64}, {"target_kl": 0.5},
], ids=name_of)
def test_every_switch_is_wired(toy, switch):
    """A setting that changes nothing is not read. Two batches of 64 show it, and three for the
    target of the KL, since beta changes only after a batch. The learning rate is high, so that
    ratios leave the clip."""
    settings = {"lr": 1e-2, "samples": 192 if "target_kl" in switch else 128}
    usual, _ = learned(toy, **settings)
    changed, _ = learned(toy, **settings | switch)
    assert not torch.equal(usual, changed)


def test_the_leash_is_steered_to_a_target_kl(toy):
    """beta falls while the KL is under its target and rises while it is over it, by at most 2% a
    batch (1909.08593)."""
    _, history = learned(toy, target_kl=1e3, samples=256)
    assert [row["beta"] for row in history] == pytest.approx([0.98 ** k for k in range(4)])
    _, history = learned(toy, target_kl=1e-4, samples=256, lr=1e-2)
    assert history[-1]["beta"] > history[1]["beta"]


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


# ---- The command

def run_rlhf(*args):
    """`python rlhf.py ARGS` -> its exit code, what it printed, and its error messages."""
    done = subprocess.run([sys.executable, "rlhf.py", *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def learned_run(small_run, tmp_path_factory):
    """A run after `python rlhf.py DIR --samples 512`: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("rlhf") / "run"
    shutil.copytree(small_run, folder)
    code, out, err = run_rlhf(folder, "--samples", "512")
    assert code == 0, err[-3000:]
    return folder, out


def contents(folder):
    return {file.relative_to(folder): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def measured(folder):
    """The rows of the command's table, measured again from the files: {first word: measure}."""
    _, _, models = load_run(folder)
    models["ppo"], _ = load_model(folder / "ppo" / "policy.pt")
    beta, held_out = read_json(folder / "flags.json")["beta"], world.prompts()[1]
    ref = evaluate.exact_logps(models["sft"], held_out)
    rows = {"optimum": evaluate.optimum(ref, beta, beta)}
    for title, name in (("reference", "sft"), ("DPO", "dpo"), ("PPO", "ppo")):
        logps = evaluate.exact_logps(models[name], held_out)
        rows[title] = evaluate.measure(logps, ref, beta)
    return rows


def test_the_command_prints_the_four_side_by_side(learned_run):
    """Reference, DPO, RLHF and optimum, in this order. Each line has the numbers of its policy,
    measured again from the files that were written."""
    folder, out = learned_run
    rows = measured(folder)
    table = out.strip().split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["reference", "DPO", "PPO", "optimum"]
    for line in table[1:]:
        row = rows[line.split()[0]]
        assert line.split()[-6:] == [
            f"{row['reward']:.3f}", f"{row['kl']:.3f}", f"{row['objective']:.3f}",
            f"{row['win_rate']:.1%}", f"{row['wellformed']:.1%}", f"{row['objective_all']:.3f}"]
    assert "with their true rewards" in out and str(folder / "ppo" / "policy.pt") in out


def test_the_commands_table_agrees_with_the_runs_summary(learned_run):
    folder, _ = learned_run
    rows, summary = measured(folder), read_json(folder / "summary.json")
    for title, row in (("reference", "reference"), ("DPO", "dpo"), ("optimum", "same_beta")):
        for column, value in rows[title].items():
            assert value == summary[evaluate.summary_key(row, column)], (title, column)


def test_the_learned_policy_is_not_above_the_frontier(learned_run):
    """Its reward is at most the best reward at its KL (1e-6), and its J at most that of pi*."""
    folder, _ = learned_run
    rows = measured(folder)
    _, _, models = load_run(folder)
    ref = world.normalise(evaluate.exact_logps(models["sft"], world.prompts()[1]))
    r = evaluate.held_out_rewards()
    row = rows["PPO"]
    star = world.optimal_policy(ref, r, world.beta_at_kl(ref, r, row["kl"]))
    assert row["reward"] <= world.expected(star, r).mean().item() + 1e-6
    assert row["objective"] <= rows["optimum"]["objective"] + 1e-9
    assert row["kl"] > 1e-4, "the policy has not moved"


def test_the_command_keeps_the_policy_and_how_it_was_learned(learned_run, small_run):
    """DIR/ppo holds the policy with its settings and its reference, and the reward model's
    metrics, which begin with ln 2. The files of the run itself stay as they were."""
    folder, _ = learned_run
    before, after = contents(small_run), contents(folder)
    new = {str(file) for file in after.keys() - before.keys()}
    assert new == {os.path.join("ppo", "policy.pt"), os.path.join("ppo", "metrics.jsonl")}
    assert all(after[file] == before[file] for file in before)
    _, facts = load_model(folder / "ppo" / "policy.pt")
    assert facts["reference"] == fingerprint(load_model(folder / "sft.pt")[0])
    assert facts["settings"]["samples"] == 512 and facts["settings"]["beta"] == 1.0
    metrics = read_jsonl(folder / "ppo" / "metrics.jsonl")
    assert {row["stage"] for row in metrics} == {"reward"}
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["accuracy"] == 0.5
    assert metrics[-1]["step"] == 15, "256 pairs in batches of 64, 4 epochs"


def test_an_interrupted_command_is_begun_again_and_ends_alike(learned_run, tmp_path):
    """Without policy.pt the work is not done, whatever else the folder holds. The same command
    then writes the policy and the metrics that it would have written, each step once."""
    folder, _ = learned_run
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "ppo" / "policy.pt").unlink()
    code, _, err = run_rlhf(tmp_path / "run", "--samples", "512")
    assert code == 0, err[-3000:]
    policies = [load_model(run / "ppo" / "policy.pt")[0] for run in (folder, tmp_path / "run")]
    assert fingerprint(policies[0]) == fingerprint(policies[1])
    steps = []
    for run in (folder, tmp_path / "run"):
        steps.append([row["step"] for row in read_jsonl(run / "ppo" / "metrics.jsonl")])
    assert steps[0] == steps[1]


def test_a_learned_policy_is_not_overwritten(learned_run):
    folder, _ = learned_run
    before = contents(folder)
    code, out, err = run_rlhf(folder, "--samples", "512")
    assert code != 0 and "not overwritten" in err and "Traceback" not in err and not out
    assert contents(folder) == before


@pytest.mark.parametrize("flags, message", [
    ({"annotator": "ai"}, "--annotator ai.*human labels"),
    ({"annotator": "length"}, "--annotator length.*human labels"),
    ({"data": "pairs.jsonl"}, "--data.*toy world"),
])
def test_a_run_without_a_known_optimum_is_refused(small_run, tmp_path, flags, message):
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    write_json(read_json(folder / "flags.json") | flags, folder / "flags.json")
    with pytest.raises(SystemExit, match=message):
        rlhf.main([str(folder), "--samples", "512"])
    assert not (folder / "ppo").exists()
    with pytest.raises(SystemExit, match=message):
        load_toy_run(folder)
    with pytest.raises(SystemExit, match="no finished run"):
        rlhf.main([str(tmp_path)])


def test_too_few_samples_are_refused_before_anything_is_trained(small_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    with pytest.raises(SystemExit):
        rlhf.main([str(folder), "--samples", "511"])
    assert "--samples 511 must be at least 512" in capsys.readouterr().err
    assert not (folder / "ppo").exists()
