"""train.py and evaluate.py: the whole run in small, resuming, the assumptions of DPO, users' data, bad flags."""
import copy
import json
import math
import shutil

import pytest
import torch

import data
import evaluate
import train
import world
from dpo import dpo_loss, pair_logps
from model import GPT, GPTConfig, load_model, save_model

SMALL = ["--pairs", "256", "--epochs", "1", "--batch-size", "32", "--n-embd", "32", "--device", "cpu"]


def lines(run, stage, key="loss"):
    return [r for r in evaluate.read_jsonl(run / "metrics.jsonl") if r["stage"] == stage and key in r]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(load_model(a)[0].parameters(), load_model(b)[0].parameters()))


# ---- The toy run

def test_run_writes_everything_it_promises(small_run):
    files = {f.name for f in small_run.iterdir()}
    assert files == {"sft.pt", "plain.pt", "dpo.pt", "metrics.jsonl", "summary.json", "flags.json", "curves.png", "frontier.png"}
    summary = json.loads((small_run / "summary.json").read_text(encoding="utf-8"))
    promised = {"ref_reward", "policy_reward", "policy_kl", "policy_wellformed", "optimal_reward_same_kl", "optimal_kl_same_beta",
                "optimal_reward_same_beta", "objective", "objective_optimal", "win_rate", "seconds"}
    assert promised <= summary.keys() and all(math.isfinite(summary[k]) for k in promised)


@pytest.mark.parametrize("stage", ["plain", "dpo"])
def test_first_dpo_loss_is_ln2(small_run, stage):
    """Step 0, before any update: policy = reference, loss ln 2 to 1e-6, rewards 0, accuracy 1/2 (float32)."""
    first = lines(small_run, stage)[0]
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), "is the reference in another mode, or another model?"
    assert abs(first["rewards/margins"]) < 1e-5 and abs(first["missing_mass"]) < 1e-5
    exact = lines(small_run, stage, "wellformed")[0]
    assert exact["step"] == 0 and abs(exact["kl"]) < 1e-9, "the measurement called step 0 was made after an update"


def test_metrics_have_their_glossary_names(small_run):
    keys = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
            "logps/rejected", "grad_norm", "lr", "pairs_per_second", "missing_mass"}
    for record in lines(small_run, "dpo"):
        assert keys <= record.keys()
        assert record["rewards/margins"] == pytest.approx(record["rewards/chosen"] - record["rewards/rejected"], abs=1e-4)


def test_the_ceiling_beside_the_accuracy_is_the_annotators_own(small_run):
    """Against 40,000 labels: their share that agrees with the annotator's score, within 4 standard errors, per annotator."""
    assert lines(small_run, "dpo")[0]["rewards/ceiling"] == pytest.approx(evaluate.annotator_ceiling("human"), abs=1e-6)
    for name, score in world.ANNOTATORS.items():
        pairs = data.make_preferences(40000, name, seed=2)
        difference = torch.tensor([score(p.prompt, p.chosen) - score(p.prompt, p.rejected) for p in pairs])
        agrees = ((difference > 1e-9) + 0.5 * (difference.abs() <= 1e-9)).mean().item()
        assert abs(agrees - evaluate.annotator_ceiling(name)) < 4 * 0.5 / 40000 ** 0.5, name


def test_summary_against_a_brute_force_of_one_prompt(small_run):
    """The table's figures again, for the mean over held-out prompts, by plain sums over the 2,304 responses."""
    summary = json.loads((small_run / "summary.json").read_text(encoding="utf-8"))
    _, _, models = evaluate.load_run(small_run)
    _, held_out = world.prompts()
    ref, pi = (evaluate.exact_logps(models[k], held_out).exp().tolist() for k in ("sft", "dpo"))
    reward = kl = mass = best = 0.0
    for x, q, p in zip(held_out, ref, pi):
        r = [world.true_reward(x, y) for y in world.responses()]
        mq, mp = math.fsum(q), math.fsum(p)
        reward += math.fsum(a / mp * b for a, b in zip(p, r)) / 8
        kl += math.fsum(a / mp * math.log(a / mp / (b / mq)) for a, b in zip(p, q)) / 8
        mass += mp / 8
        best += summary["beta"] * math.log(math.fsum(b / mq * math.exp(c / summary["beta"]) for b, c in zip(q, r))) / 8
    assert summary["policy_reward"] == pytest.approx(reward, abs=1e-9)
    assert summary["policy_kl"] == pytest.approx(kl, abs=1e-9)
    assert summary["policy_wellformed"] == pytest.approx(mass, abs=1e-9)
    assert summary["objective"] == pytest.approx(reward - summary["beta"] * kl, abs=1e-9)
    assert summary["objective_optimal"] == pytest.approx(best, abs=1e-9), "J(pi*) = beta log Z (Eq. 4, claim 1)"
    assert summary["objective"] < summary["objective_optimal"]
    assert summary["policy_reward"] < summary["optimal_reward_same_kl"] + 1e-9


def test_objective_over_all_text_never_beats_its_optimum(small_run):
    s = json.loads((small_run / "summary.json").read_text(encoding="utf-8"))
    assert s["objective_all"] < s["objective_all_optimal"] < s["objective_optimal"] + 1e-9


def test_a_finished_run_is_not_overwritten(small_run):
    before = (small_run / "dpo.pt").read_bytes()
    with pytest.raises(SystemExit, match="finished run"):
        train.main(["--out-dir", str(small_run), *SMALL])
    assert (small_run / "dpo.pt").read_bytes() == before


def test_evaluating_again_gives_the_same_summary(small_run, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(small_run, run)
    before = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    again = evaluate.report(run)
    assert again == {k: v for k, v in before.items() if k != "seconds"}
    printed = capsys.readouterr().out
    assert f"{again['policy_reward']:.3f}" in printed and "optimum at DPO's KL" in printed and "with their true rewards" in printed


def test_own_prompt_is_answered_by_both_models(small_run, capsys):
    _, tokenizer, models = evaluate.load_run(small_run)
    evaluate.show_answers(models, tokenizer, "Is this a film?")
    printed = capsys.readouterr().out
    assert "reference" in printed and "plain DPO" in printed
    with pytest.raises(SystemExit, match="tokens"):
        evaluate.show_answers(models, tokenizer, "x" * 500)


def test_a_policy_is_not_measured_against_another_reference(small_run, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(small_run, run)
    save_model(load_model(run / "dpo.pt")[0], run / "sft.pt", tokenizer="toy")
    with pytest.raises(SystemExit, match="another reference"):
        evaluate.load_run(run)


# ---- Resuming

def test_a_resumed_run_is_the_uninterrupted_run(small_run, tmp_path, monkeypatch):
    """Interrupted in SFT and again in DPO, continued each time: the same weights to the bit, the same metrics."""
    monkeypatch.setattr(train, "SFT_TEXTS", 640)
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    run, original = tmp_path / "run", train.lr_at
    calls = {"left": 14}

    def die(step, total, peak):
        calls["left"] -= 1
        if calls["left"] == 0:
            raise KeyboardInterrupt
        return original(step, total, peak)
    monkeypatch.setattr(train, "lr_at", die)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--out-dir", str(run), *SMALL])
    assert (run / "state.pt").exists() and not (run / "sft.pt").exists()
    calls["left"] = 20
    with pytest.raises(SystemExit, match="--resume"):
        train.main(["--out-dir", str(run), *SMALL])
    with pytest.raises(SystemExit, match="--seed was 0, is 1"):
        train.main(["--out-dir", str(run), "--resume", *SMALL, "--seed", "1"])
    with pytest.raises(KeyboardInterrupt):
        train.main(["--out-dir", str(run), "--resume", *SMALL])
    calls["left"] = -1
    train.main(["--out-dir", str(run), "--resume", *SMALL])
    for name in ("sft.pt", "plain.pt", "dpo.pt"):
        assert same_weights(run / name, small_run / name), f"{name} differs from that of the uninterrupted run"
    for stage in ("sft", "plain", "dpo"):
        a, b = lines(run, stage), lines(small_run, stage)
        assert [r["step"] for r in a] == sorted({r["step"] for r in a}), "a step is logged twice"
        assert a[-1]["step"] == b[-1]["step"]


# ---- DPO's assumptions

@pytest.fixture
def tiny():
    """A reference, a policy begun from it, 24 toy pairs and the reference's log-probs of them."""
    torch.manual_seed(0)
    tokenizer = data.get_tokenizer("toy")
    examples, _ = data.tokenize(data.make_preferences(24), tokenizer)
    reference = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32, dropout=0.3))
    reference.eval().requires_grad_(False)
    return reference, copy.deepcopy(reference).requires_grad_(True), examples, train.reference_logps(reference, examples, 7, "cpu")


def dpo_args(tmp_path, *more):
    return train.parse_args(["--out-dir", str(tmp_path), "--epochs", "2", "--batch-size", "8", "--lr", "1e-2", *more])


def test_reference_logps_belong_to_their_examples(tiny):
    """Row by row, one example at a time, whatever order the cache was filled in (1e-5)."""
    reference, _, examples, (chosen, rejected) = tiny
    for i, e in enumerate(examples):
        w, l = pair_logps(reference, data.collate([e]))
        assert abs(w.item() - chosen[i].item()) < 1e-5 and abs(l.item() - rejected[i].item()) < 1e-5, f"row {i}"


def test_training_is_offline_and_leaves_the_reference_alone(tiny, tmp_path, monkeypatch):
    """No sample is drawn, no weight of the reference moves or is shared, and the policy does move."""
    reference, policy, examples, ref_logps = tiny
    monkeypatch.setattr(GPT, "generate", lambda *a, **k: pytest.fail("DPO is offline: training must not sample"))
    before = copy.deepcopy(reference.state_dict())
    train.train_dpo("dpo", policy, examples, ref_logps, dpo_args(tmp_path), train.Log(tmp_path / "metrics.jsonl"), 0.1, 0.0)
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())
    assert not {p.data_ptr() for p in reference.parameters()} & {p.data_ptr() for p in policy.parameters()}
    assert not any(torch.equal(p, q) for (n, p), q in zip(policy.named_parameters(), reference.parameters()) if "c_fc.weight" in n)


def test_dropout_is_off_in_both_models(tiny, tmp_path):
    """Claim 45: with dropout 0.3 configured and the policy handed over in train mode, step 0 is still ln 2 to 1e-6."""
    _, policy, examples, ref_logps = tiny
    log = train.Log(tmp_path / "metrics.jsonl")
    train.train_dpo("dpo", policy.train(), examples, ref_logps, dpo_args(tmp_path), log, 0.0, 0.0)
    assert lines(tmp_path, "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_cached_reference_is_what_training_uses(tiny, tmp_path):
    """Poison the cache and the first loss changes to what the poison makes it."""
    _, policy, examples, (chosen, rejected) = tiny
    train.train_dpo("dpo", policy, examples, (chosen - 1, rejected), dpo_args(tmp_path), train.Log(tmp_path / "metrics.jsonl"), 0, 0)
    assert lines(tmp_path, "dpo")[0]["loss"] == pytest.approx(math.log1p(math.exp(-1.0)), abs=1e-5), "beta = 1, margin 1"


def test_accuracy_ranks_implicit_rewards_and_counts_ties_half(tiny, tmp_path):
    """A policy with weights 0 finds every token equally likely, as its reference does: all margins tie, accuracy 1/2 and not
    0. And against a reference of twice the log-probs, the log-ratios rank every pair the other way round than the
    log-probs do."""
    reference, policy, examples, (chosen, rejected) = tiny

    def first_accuracy(name, policy, ref):
        out = tmp_path / name
        out.mkdir()
        train.train_dpo("dpo", policy, examples, ref, dpo_args(out, "--batch-size", "24"), train.Log(out / "metrics.jsonl"), 0, 0)
        return lines(out, "dpo")[0]["rewards/accuracies"]
    uniform = copy.deepcopy(policy)
    with torch.no_grad():
        for p in uniform.parameters():
            p.zero_()
    assert first_accuracy("ties", uniform, train.reference_logps(uniform, examples, 7, "cpu")) == 0.5, "ties count 1/2"
    raw = (chosen > rejected).float().mean().item()
    assert first_accuracy("twice", policy, (2 * chosen, 2 * rejected)) == pytest.approx(1 - raw, abs=0.01), \
        "the accuracy is of raw log-probs: rank the log-ratios"
    assert abs(raw - 0.5) > 0.02, "or the two could not be told apart"


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.3, 0.2)])
def test_eight_parts_of_one_are_one_batch_of_eight(tiny, tmp_path, weights, monkeypatch):
    """Claim 46, with and without the two extra terms: every entry of the first step's gradient, 1e-6 of the largest."""
    _, policy, examples, ref_logps = tiny
    clip, gradients = torch.nn.utils.clip_grad_norm_, []

    def record(parameters, limit):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    first = []
    for parts in ("1", "8", "3"):                      # 3: parts of 3, 3 and 2
        out = tmp_path / parts
        out.mkdir()
        gradients.clear()
        train.train_dpo("dpo", copy.deepcopy(policy), examples, ref_logps, dpo_args(out, "--accumulate", parts),
                        train.Log(out / "metrics.jsonl"), *weights)
        first.append(gradients[0].clone())
    for other in first[1:]:
        assert first[0].abs().max() > 0.1
        assert (other - first[0]).abs().max() < 1e-6 * first[0].abs().max(), "weigh each part's loss by its share of the batch"


def test_sft_weighs_texts_not_tokens(tmp_path):
    """A batch of short texts and one of long ones must pull alike per text: the loss of a batch is the mean text's NLL."""
    texts = [([65], [66] * n + [67]) for n in (2, 2, 9, 9)]
    model = GPT(GPTConfig(block_size=16, vocab_size=70, n_layer=1, n_head=1, n_embd=32))
    args = train.parse_args(["--out-dir", str(tmp_path), "--sft-epochs", "1", "--sft-lr", "1e-9"])
    train.train_sft(model, texts, args, train.Log(tmp_path / "metrics.jsonl"))
    expected = 0.0
    for x, y in texts:
        logps = torch.log_softmax(model(torch.tensor([x + y]))[0], -1)
        expected -= sum(logps[len(x) - 1 + i, token].item() for i, token in enumerate(y)) / 4
    assert lines(tmp_path, "sft")[0]["loss"] == pytest.approx(expected, abs=1e-3)


def test_learning_rate_warms_up_and_goes_to_zero():
    rates = [train.lr_at(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(2 / 30) and max(rates) == pytest.approx(2.0, rel=0.01) and rates[-1] < 1e-4
    assert rates.index(max(rates)) in range(25, 31)


# ---- A user's data

@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"Question {i}:", "chosen": f" yes {i}", "rejected": f" no, {i}!"} for i in range(40)]
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[9]["chosen"] = "x" * 100
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_own_data_end_to_end(user_file, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--data", str(user_file), "--out-dir", str(out), "--n-layer", "1", "--n-embd", "32", "--max-length", "60",
                "--device", "cpu", "--sft-epochs", "2", "--epochs", "4"])
    printed = capsys.readouterr().out
    assert "40 pairs; 35 to train on, 4 held out" in printed
    assert "1 rows have chosen == rejected" in printed and "line 8" in printed
    assert "1 train pairs are longer than --max-length 60" in printed and "line 10" in printed
    assert "'Question" in printed and "held out: 4 pairs" in printed
    assert lines(out, "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["accuracy"][0] > 0.5 and summary["kl"][0] > 0 and summary["held_out_pairs"] == 4
    assert not (out / "plain.pt").exists() and not (out / "frontier.png").exists()


def test_init_from_a_checkpoint_and_no_sft(user_file, tmp_path):
    tokenizer = data.get_tokenizer("toy")
    start = GPT(GPTConfig(block_size=128, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=32))
    save_model(start, tmp_path / "start.pt")
    common = ["--data", str(user_file), "--init", str(tmp_path / "start.pt"), "--sft-epochs", "0", "--epochs", "1", "--device", "cpu"]
    train.main([*common, "--out-dir", str(tmp_path / "run")])
    assert same_weights(tmp_path / "run" / "sft.pt", tmp_path / "start.pt"), "with no SFT the given weights are the reference"
    save_model(GPT(GPTConfig(block_size=32, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=32)), tmp_path / "start.pt")
    with pytest.raises(SystemExit, match="--max-length 32"):
        train.main([*common, "--out-dir", str(tmp_path / "run2")])


def test_a_row_that_cannot_be_used_ends_the_run_before_training(user_file, tmp_path):
    user_file.write_text(user_file.read_text(encoding="utf-8") + '\n{"prompt": "x"}', encoding="utf-8")
    with pytest.raises(data.DataError, match="line 41"):
        train.main(["--data", str(user_file), "--out-dir", str(tmp_path / "run")])


# ---- Flags

@pytest.mark.parametrize("flags, message", [
    (["--beta", "0"], "beta=0.0"), (["--label-smoothing", "0.6"], "0.6"), (["--n-embd", "50"], "multiple of 32"),
    (["--epochs", "0"], "--epochs 0"), (["--tokenizer", "gpt2"], "needs --data"), (["--sft-epochs", "0"], "needs --init"),
    (["--loss", "ipo", "--label-smoothing", "0.1"], "not defined"), (["--bta", "1"], "unrecognized")])
def test_flags_that_mean_nothing_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(flags)
    assert message in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_stops_the_run(tiny, tmp_path):
    _, policy, examples, (chosen, rejected) = tiny
    with pytest.raises(SystemExit, match="not finite"):
        train.train_dpo("dpo", policy, examples, (chosen * math.nan, rejected), dpo_args(tmp_path),
                        train.Log(tmp_path / "metrics.jsonl"), 0.0, 0.0)


def test_a_folder_without_a_run_says_how_to_make_one(tmp_path):
    with pytest.raises(SystemExit, match="python train.py --out-dir"):
        evaluate.load_run(tmp_path)


def test_data_that_changed_after_training_are_refused(user_file, tmp_path):
    """A changed file would be split anew, and what was trained on could be held out."""
    out = tmp_path / "run"
    train.main(["--data", str(user_file), "--out-dir", str(out), "--n-layer", "1", "--n-embd", "32", "--device", "cpu",
                "--sft-epochs", "1", "--epochs", "1"])
    user_file.write_text(user_file.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    with pytest.raises(data.DataError, match="has changed"):
        evaluate.report(out)
