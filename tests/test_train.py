"""train.py and evaluate.py: the whole run in small, resuming, the assumptions of DPO, and users'
data. More about a run's folder is proved in test_run.py, more about users' data in
test_own_data.py, and more about flags in test_flags.py."""
import copy
import json
import math
import shutil
import sys

import pytest
import torch

import data
import evaluate
import support.run
import train
import world
from dpo import pair_logps
from model import GPT, GPTConfig
from support import show, toy_data
from support.checkpoints import load_model, save_model
from support.files import read_jsonl
from support.likely import LikelyTokens
from support.run import Run, load_run

pytestmark = pytest.mark.slow

SMALL = ["--pairs", "256", "--epochs", "1", "--batch-size", "32", "--n-embd", "32",
         "--device", "cpu"]


def lines(folder, stage, key="loss"):
    """What a run has recorded of a stage: the lines of metrics.jsonl that hold this key."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return [row for row in rows if row["stage"] == stage and key in row]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def same_weights(a, b):
    weights = load_model(a)[0].parameters(), load_model(b)[0].parameters()
    return all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


@pytest.fixture
def copied_run(small_run, tmp_path):
    """A copy of the small run that a test may change."""
    shutil.copytree(small_run, tmp_path / "copy")
    return tmp_path / "copy"


# ---- The toy run

# What others may rely on in the summary of a toy run.
PROMISED = {"ref_reward", "policy_reward", "policy_kl", "policy_wellformed",
            "optimal_reward_same_kl", "optimal_reward_same_beta", "optimal_kl_same_beta",
            "objective", "objective_optimal", "win_rate", "seconds"}
ROWS = ["reference", "plain", "dpo", "same_kl", "same_beta"]
COLUMNS = ["reward", "kl", "objective", "win_rate", "wellformed", "objective_all"]
BESIDE_THE_TABLE = {"beta", "captured", "plain_captured", "optimal_beta_same_kl",
                    "objective_all_optimal", "label_ceiling", "ref_kl_from_grammar", "seconds"}


def test_run_writes_everything_it_promises(small_run):
    files = {f.name for f in small_run.iterdir()}
    assert files == {"sft.pt", "plain.pt", "dpo.pt", "metrics.jsonl", "summary.json",
                     "flags.json", "curves.png", "frontier.png"}
    summary = summary_of(small_run)
    assert PROMISED <= summary.keys()
    assert all(math.isfinite(summary[key]) for key in PROMISED)


def test_the_summary_holds_every_number_once(small_run):
    """Its keys are the cells of the table, and what stands beside the table, and nothing else.
    Every key but flags holds one number. No number stands under two keys, except where two cells
    must agree: J of the reference is its reward, since its KL is 0; the optimum at DPO's KL has
    DPO's KL; a policy of well-formed text alone has a well-formed mass of 1."""
    summary = summary_of(small_run)
    cells = [show.summary_key(row, column) for row in ROWS for column in COLUMNS]
    assert len(set(cells)) == len(ROWS) * len(COLUMNS), "two cells share a name"
    assert summary.keys() == {*cells, *BESIDE_THE_TABLE, "flags"}
    numbers = {key: value for key, value in summary.items() if key != "flags"}
    assert all(isinstance(value, float) for value in numbers.values())

    assert numbers.pop("ref_objective") == numbers["ref_reward"]
    assert numbers.pop("optimal_kl_same_kl") == pytest.approx(numbers["policy_kl"], abs=1e-9)
    for key in ("optimal_wellformed_same_kl", "optimal_wellformed_same_beta"):
        assert numbers.pop(key) == pytest.approx(1, abs=1e-12)
    assert len(set(numbers.values())) == len(numbers), "a number stands in the summary twice"


def test_a_summary_without_plain_dpo_has_no_row_for_it(small_run):
    _, _, models = load_run(small_run)
    del models["plain"]
    summary = evaluate.toy_summary(models, 1.0)
    assert summary.keys() == {key for key in summary_of(small_run) if "plain" not in key} - {
        "flags", "seconds"}
    assert "lain DPO" not in show.toy_table(summary)


@pytest.mark.parametrize("stage", ["plain", "dpo"])
def test_first_dpo_loss_is_ln2(small_run, stage):
    """Step 0, before any update: the policy is the reference. The loss is ln 2 to 1e-6 (float32),
    rewards are 0, the accuracy is 1/2."""
    first = lines(small_run, stage)[0]
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), \
        "is the reference in another mode, or is it another model?"
    assert abs(first["rewards/margins"]) < 1e-5
    exact = lines(small_run, stage, "wellformed")[0]
    assert exact["step"] == 0
    assert abs(exact["kl"]) < 1e-9, "the measurement of step 0 was made after an update"


def test_metrics_have_their_glossary_names(small_run):
    keys = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
            "rewards/accuracies", "rewards/ceiling", "logps/chosen", "logps/rejected",
            "grad_norm", "lr", "pairs_per_second", "stray_mass"}
    for row in lines(small_run, "dpo"):
        assert keys <= row.keys()
        difference = row["rewards/chosen"] - row["rewards/rejected"]
        assert row["rewards/margins"] == pytest.approx(difference, abs=1e-4)


def test_the_policy_is_measured_on_its_way(small_run):
    """256 pairs in batches of 32 are 8 steps. The shares of train.MEASURE_AT fall on these. The
    last measurement is the summary's, to 1e-6: one thread rounds otherwise than two."""
    for stage in ("plain", "dpo"):
        steps = [row["step"] for row in lines(small_run, stage, "wellformed")]
        assert steps == [0, 1, 2, 5, 8]
        last = lines(small_run, stage, "wellformed")[-1]
        row = "dpo" if stage == "dpo" else "plain"
        for column in COLUMNS:
            want = summary_of(small_run)[show.summary_key(row, column)]
            assert last[column] == pytest.approx(want, rel=1e-6), column


def test_the_ceiling_beside_the_accuracy_is_the_annotators_own(small_run):
    """For each annotator, the share of 40,000 labels that agree with its score, within 4 standard
    errors."""
    logged = lines(small_run, "dpo")[0]["rewards/ceiling"]
    assert logged == pytest.approx(toy_data.ceiling("human"), abs=1e-6)
    for name, score in world.ANNOTATORS.items():
        differences = []
        for pair in data.make_preferences(40000, name, seed=2):
            difference = score(pair.prompt, pair.chosen) - score(pair.prompt, pair.rejected)
            differences.append(difference)
        difference = torch.tensor(differences)
        tie = difference.abs() <= 1e-9
        agrees = ((difference > 1e-9) + 0.5 * tie).mean().item()
        error = abs(agrees - toy_data.ceiling(name))
        assert error < 4 * 0.5 / 40000 ** 0.5, name


def test_evaluating_again_gives_the_same_summary(copied_run, capsys):
    before = summary_of(copied_run)
    again = evaluate.report(copied_run)
    assert again == {key: value for key, value in before.items() if key != "seconds"}
    printed = capsys.readouterr().out
    assert f"{again['policy_reward']:.3f}" in printed
    assert "optimum at DPO's KL" in printed and "with their true rewards" in printed


def test_the_command_that_evaluates_writes_the_same_summary(copied_run, monkeypatch):
    """`python evaluate.py DIR` keeps the seconds that the training took, and draws the figures."""
    before = (copied_run / "summary.json").read_bytes()
    (copied_run / "curves.png").unlink()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(copied_run)])
    evaluate.main()
    assert (copied_run / "summary.json").read_bytes() == before
    assert (copied_run / "curves.png").stat().st_size > 20_000


def test_own_prompt_is_answered_by_both_models(small_run, capsys):
    _, tokenizer, models = load_run(small_run)
    show.answers(models, tokenizer, "Is this a film?")
    printed = capsys.readouterr().out
    assert "reference" in printed and "plain DPO" in printed
    with pytest.raises(SystemExit, match="tokens"):
        show.answers(models, tokenizer, "x" * 500)


# ---- Resuming

def without_speed(rows):
    return [{key: value for key, value in row.items() if not key.endswith("per_second")}
            for row in rows]


def test_a_resumed_run_is_the_uninterrupted_run(small_run, tmp_path, monkeypatch):
    """Four interruptions, each in the middle of a step: in SFT; in DPO before anything was saved
    and after that; in plain DPO. The run goes on each time. In the end weights, metrics and summary
    are those of a run that nobody interrupted, to the bit. Here DPO and plain DPO come one after
    the other, in the run that nobody interrupted they are side by side."""
    monkeypatch.setattr(train, "SFT_TEXTS", 640)
    monkeypatch.setattr(support.run, "SAVE_EVERY", 3)
    monkeypatch.setattr(support.run, "LOG_EVERY", 3)
    train.main(["--out-dir", str(tmp_path / "whole"), *SMALL])
    run = tmp_path / "run"
    command, clip = ["--out-dir", str(run), *SMALL], train.clip_grad_norm_
    steps_left = 14  # 20 steps of SFT, 8 of DPO and 8 of plain DPO are ahead

    def die_in_time(*args):
        nonlocal steps_left
        steps_left -= 1
        if steps_left == 0:
            raise KeyboardInterrupt
        return clip(*args)

    def saved(folder):
        state = torch.load(folder / "state.pt", weights_only=True)
        return state["stage"], state["step"]

    def in_turn(jobs, device):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # how many there are decides how a sum is rounded
        try:
            for job in jobs:
                job()
        finally:
            torch.set_num_threads(threads)
    monkeypatch.setattr(train, "clip_grad_norm_", die_in_time)
    monkeypatch.setattr(train.processes, "side_by_side", in_turn)

    with pytest.raises(KeyboardInterrupt):  # step 13 of SFT
        train.main(command)
    assert saved(run) == ("sft", 12) and not (run / "sft.pt").exists()
    with pytest.raises(SystemExit, match="--resume"):
        train.main(command)
    with pytest.raises(SystemExit, match="--seed was 0, is 1"):
        train.main([*command, "--resume", "--seed", "1"])

    steps_left = 8 + 2  # steps 12 to 19 of SFT, then step 1 of DPO
    with pytest.raises(KeyboardInterrupt):
        train.main([*command, "--resume"])
    assert (run / "sft.pt").exists() and not (run / "state.pt").exists()

    steps_left = 5  # step 4 of DPO
    with pytest.raises(KeyboardInterrupt):
        train.main([*command, "--resume"])
    assert saved(run) == ("dpo", 3) and not (run / "dpo.pt").exists()

    steps_left = 5 + 8  # steps 3 to 7 of DPO, then step 7 of plain DPO
    with pytest.raises(KeyboardInterrupt):
        train.main([*command, "--resume"])
    assert saved(run / "plain") == ("plain", 6) and (run / "dpo.pt").exists()

    steps_left = -1
    train.main([*command, "--resume"])
    assert not (run / "state.pt").exists() and not (run / "plain").exists()
    for name in ("sft.pt", "plain.pt", "dpo.pt"):
        assert same_weights(run / name, tmp_path / "whole" / name), f"{name} is another one"
        assert same_weights(run / name, small_run / name), "how often a run saves has an effect"
    metrics = read_jsonl(run / "metrics.jsonl")
    assert without_speed(metrics) == without_speed(read_jsonl(tmp_path / "whole/metrics.jsonl"))
    for stage in ("sft", "plain", "dpo"):
        steps = [row["step"] for row in lines(run, stage)]
        assert steps == sorted(set(steps)), "a step is logged twice"
    seconds = {"seconds": 0}
    assert summary_of(run) | seconds == summary_of(tmp_path / "whole") | seconds


# ---- DPO's assumptions

@pytest.fixture
def tiny():
    """A reference, a policy begun from it, 24 toy pairs, and the reference's log-probabilities of
    them."""
    torch.manual_seed(0)
    tokenizer = data.get_tokenizer("toy")
    examples, _ = data.tokenize(data.make_preferences(24), tokenizer)
    reference = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2,
                              n_embd=32, dropout=0.3))
    reference.eval().requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    return reference, policy, examples, train.reference_logps(reference, examples, 7)


def train_in(folder, policy, examples, ref_logps, **settings):
    """Train a policy on the pairs of `tiny`. The run's folder is `folder`."""
    usual = {"beta": 1.0, "epochs": 2, "batch_size": 8, "lr": 1e-2, "seed": 0}
    train.train_dpo(policy, examples, ref_logps, Run(folder), **usual | settings)


def test_reference_logps_belong_to_their_examples(tiny):
    """Row by row, one example at a time, in whatever order they were computed (5e-5: near -80, a
    float32 is known to 8e-6)."""
    reference, _, examples, (chosen, rejected) = tiny
    for i, example in enumerate(examples):
        w, l = pair_logps(reference, data.collate([example]))
        assert abs(w.item() - chosen[i].item()) < 5e-5, f"row {i}"
        assert abs(l.item() - rejected[i].item()) < 5e-5, f"row {i}"


def test_training_is_offline_and_leaves_the_reference_alone(tiny, tmp_path, monkeypatch):
    """No sample is drawn. No weight of the reference moves or is shared. The policy does move."""
    reference, policy, examples, ref_logps = tiny
    likely = LikelyTokens(0.02)
    train.reference_logps(reference, examples, 7, likely)

    def no_samples(*args, **kwargs):
        pytest.fail("DPO is offline: training must not sample")
    monkeypatch.setattr(GPT, "generate", no_samples)
    before = copy.deepcopy(reference.state_dict())
    train_in(tmp_path, policy, examples, ref_logps, likely=likely, stray_weight=0.1)
    for name, weight in reference.state_dict().items():
        assert torch.equal(weight, before[name]), name
    in_reference = {p.data_ptr() for p in reference.parameters()}
    assert not in_reference & {p.data_ptr() for p in policy.parameters()}
    for (name, p), q in zip(policy.named_parameters(), reference.parameters()):
        assert "c_fc.weight" not in name or not torch.equal(p, q), "the policy does not move"


def test_dropout_is_off_in_both_models(tiny, tmp_path):
    """Claim 45. The model has dropout 0.3, and the policy arrives in train mode. The loss of step
    0, as it is logged, is still ln 2, to 1e-6."""
    _, policy, examples, ref_logps = tiny
    train_in(tmp_path, policy.train(), examples, ref_logps)
    assert lines(tmp_path, "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_cached_reference_is_what_training_uses(tiny, tmp_path):
    """Change the cache, and the first loss changes as the change says."""
    _, policy, examples, (chosen, rejected) = tiny
    train_in(tmp_path, policy, examples, (chosen - 1, rejected))
    loss = lines(tmp_path, "dpo")[0]["loss"]
    assert loss == pytest.approx(math.log1p(math.exp(-1.0)), abs=1e-5), "beta = 1, h = 1"


# At beta h = 1/2: -log sigma(beta h) = log(1 + exp(-1/2)), and for the flipped label the same
# with +1/2.
RIGHT, FLIPPED = math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.5))


@pytest.mark.parametrize("loss, label_smoothing, want", [
    ("sigmoid", 0.0, RIGHT),
    ("cdpo", 0.0, RIGHT),
    ("cdpo", 0.2, 0.8 * RIGHT + 0.2 * FLIPPED),
    ("robust", 0.2, (0.8 * RIGHT - 0.2 * FLIPPED) / 0.6),
    ("ipo", 0.0, (1 - 1 / (2 * 0.5)) ** 2),
    ("hinge", 0.0, 1 - 0.5),
])
def test_the_settings_reach_the_loss(tiny, tmp_path, loss, label_smoothing, want):
    """The first loss, with h = 1 and beta = 1/2, from the formula of each (1e-5)."""
    _, policy, examples, (chosen, rejected) = tiny
    train_in(tmp_path, policy, examples, (chosen - 1, rejected), beta=0.5, loss=loss,
             label_smoothing=label_smoothing)
    assert lines(tmp_path, "dpo")[0]["loss"] == pytest.approx(want, abs=1e-5)


def test_accuracy_ranks_implicit_rewards_and_counts_ties_half(tiny, tmp_path):
    """A policy whose weights are 0 finds every token equally likely, and so does its reference.
    All margins are ties. The accuracy is 1/2, not 0.

    A reference of twice the log-probabilities turns every ranking round: the log-ratios rank a
    pair the other way than the log-probabilities do.
    """
    _, policy, examples, (chosen, rejected) = tiny

    def first_accuracy(name, policy, ref_logps):
        train_in(tmp_path / name, policy, examples, ref_logps, batch_size=24)
        return lines(tmp_path / name, "dpo")[0]["rewards/accuracies"]
    uniform = copy.deepcopy(policy)
    with torch.no_grad():
        for p in uniform.parameters():
            p.zero_()
    uniform_logps = train.reference_logps(uniform, examples, 7)
    assert first_accuracy("ties", uniform, uniform_logps) == 0.5, "ties count 1/2"
    raw = (chosen > rejected).float().mean().item()
    turned_round = first_accuracy("twice", policy, (2 * chosen, 2 * rejected))
    assert turned_round == pytest.approx(1 - raw, abs=0.01), \
        "this ranks log-probabilities; the implicit rewards are log-ratios"
    assert abs(raw - 0.5) > 0.02, "or the two could not be told apart"


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.3, 0.2)])
def test_eight_parts_of_one_are_one_batch_of_eight(tiny, tmp_path, weights, monkeypatch):
    """Claim 46, in the trainer, with and without the two extra terms. The first step's gradient in
    1, 3 and 8 parts is compared entry by entry, to 1e-6 of the largest."""
    reference, policy, examples, ref_logps = tiny
    stray_weight, nll_weight = weights
    likely = LikelyTokens(0.02)
    train.reference_logps(reference, examples, 7, likely)
    clip, gradients = train.clip_grad_norm_, []

    def record(parameters, limit):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, limit)
    monkeypatch.setattr(train, "clip_grad_norm_", record)
    first = []
    for parts in (1, 8, 3):  # 3: parts of 3, 3 and 2
        gradients.clear()
        train_in(tmp_path / str(parts), copy.deepcopy(policy), examples, ref_logps,
                 accumulate=parts, likely=likely, stray_weight=stray_weight, nll_weight=nll_weight)
        first.append(gradients[0].clone())
    largest = first[0].abs().max()
    assert largest > 0.1
    for other in first[1:]:
        assert (other - first[0]).abs().max() < 1e-6 * largest, \
            "weigh each part's loss by its share of the batch"


# ---- A user's data

@pytest.fixture
def user_file(tmp_path):
    rows = []
    for i in range(40):
        rows.append({"prompt": f"Question {i}:", "chosen": f" yes {i}", "rejected": f" no, {i}!"})
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[9]["chosen"] = "x" * 100
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_own_data_end_to_end(user_file, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--data", str(user_file), "--out-dir", str(out), "--n-layer", "1",
                "--n-embd", "32", "--max-length", "60", "--device", "cpu",
                "--sft-epochs", "2", "--epochs", "4"])
    printed = capsys.readouterr().out
    assert "40 pairs; 35 to train on, 4 held out" in printed
    assert "1 rows have chosen == rejected" in printed and "line 8" in printed
    assert "1 train pairs are longer than --max-length 60" in printed and "line 10" in printed
    assert "'Question" in printed and "held out: 4 pairs" in printed
    assert lines(out, "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    summary = summary_of(out)
    assert summary["accuracy"][0] > 0.5 and summary["kl"][0] > 0
    assert summary["held_out_pairs"] == 4
    assert not (out / "plain.pt").exists() and not (out / "frontier.png").exists()


def test_weights_that_cannot_read_the_longest_pair_are_refused(user_file, tmp_path):
    tokenizer = data.get_tokenizer("toy")
    start = GPT(GPTConfig(32, tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=32))
    save_model(start, tmp_path / "start.pt")
    with pytest.raises(SystemExit, match="--max-length 32"):
        train.main(["--data", str(user_file), "--init", str(tmp_path / "start.pt"),
                    "--sft-epochs", "0", "--out-dir", str(tmp_path / "run"), "--device", "cpu"])


def test_a_row_that_cannot_be_used_ends_the_run_before_training(user_file, tmp_path):
    text = user_file.read_text(encoding="utf-8")
    user_file.write_text(text + '\n{"prompt": "x"}', encoding="utf-8")
    with pytest.raises(data.DataError, match="line 41"):
        train.main(["--data", str(user_file), "--out-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists(), "a failed start leaves a folder behind"
