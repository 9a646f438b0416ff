"""`python train.py`, with the trainings left out: each is replaced by a note of how it was called.
What the trainings do is proved in test_steps.py, and the whole run in test_train.py."""
import copy
import json
import math

import pytest
import torch

import data
import evaluate
import support.figures
import train
import world
from losses import LIKELY
from model import GPT, GPTConfig
from support import checkpoints, flags, toy_data
from support.files import read_json
from tools import assert_same

MOVED = {"plain": 3, "dpo": 4}
threads = []  # how many each training had


@pytest.fixture
def notes(monkeypatch):
    """What main() does, in its order: a list of (name, arguments). Models are noted as copies."""
    found = []

    def replace(module, name, result=None):
        def note(*args, **kwargs):
            args = [copy.deepcopy(a) if isinstance(a, GPT) else a for a in args]
            found.append((name, args, kwargs))
            return result
        monkeypatch.setattr(module, name, note)

    def move(policy, *args, **kwargs):
        """A training that changes one weight, so that what is saved can be told from the start."""
        found.append(("train_dpo", [copy.deepcopy(policy), *args], kwargs))
        threads.append(torch.get_num_threads())
        with torch.no_grad():
            policy.ln_f.bias += MOVED[kwargs["stage"]]

    def move_sft(model, *args, **kwargs):
        found.append(("train_sft", [copy.deepcopy(model), *args], kwargs))
        assert all(p.requires_grad for p in model.parameters())
        with torch.no_grad():
            model.ln_f.bias += 1
    def exact_logps(model, prompts):
        """A stand-in: the grammar, tilted as far as the model has been trained."""
        rewards = torch.tensor([len(y) / 40 for y in world.responses()])  # (N,)
        return torch.log_softmax(world.grammar_logps(prompts) + bias(model) * rewards, -1)

    monkeypatch.setattr(evaluate, "exact_logps", exact_logps)
    monkeypatch.setattr(train, "SFT_TEXTS", 30)
    monkeypatch.setattr(train, "train_sft", move_sft)
    monkeypatch.setattr(train, "train_dpo", move)
    replace(train, "reference_logps", result="the reference's log-probabilities")
    replace(evaluate, "report", result={"a number": 1.5})
    replace(support.figures, "draw_run")
    return found


def run(folder, *args):
    train.main(["--out-dir", str(folder), "--device", "cpu", *args])


def names(notes):
    return [name for name, _, _ in notes]


def bias(model):
    return model.ln_f.bias[0].item()


def test_the_toy_run_step_by_step(notes, tmp_path, capsys):
    """SFT; the reference's log-probabilities; plain DPO and DPO, in any order, from the same
    reference and with the same settings but the remedies; the measurement. And what each step is
    given."""
    out = tmp_path / "run"
    run(out, "--pairs", "20", "--beta", "0.5", "--seed", "3", "--lr", "0.25", "--sft-lr", "0.125",
        "--accumulate", "2", "--nll-weight", "0.5")
    assert names(notes) == ["train_sft", "reference_logps", "train_dpo", "train_dpo", "report",
                            "draw_run"]
    tokenizer = data.get_tokenizer("toy")
    eos = [tokenizer.eot_token]
    texts = []
    for prompt, response in data.make_sft_corpus(30, 3):
        texts.append((tokenizer.encode_ordinary(prompt), tokenizer.encode_ordinary(response) + eos))
    pairs = data.make_preferences(20, "human", 3)
    examples, _ = data.tokenize(pairs, tokenizer)

    _, [model, got_texts, _], how = notes[0]
    assert model.config == GPTConfig(64, tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=64)
    torch.manual_seed(3)  # the seed decides the weights that a run begins with
    assert_same(model.wte.weight, GPT(model.config).wte.weight, 0, what="the first weights")
    assert got_texts == texts
    assert how == {"epochs": 1, "lr": 0.125, "batch_size": 32, "seed": 3, "accumulate": 2}
    printed = capsys.readouterr().out
    size = sum(p.numel() for p in model.parameters())
    assert (f"{size:,} parameters on cpu. SFT on 30 texts, then DPO on 20 pairs, beta = 0.5."
            in printed)

    _, [reference, got_examples, batch_size, likely], _ = notes[1]
    assert likely.least == LIKELY
    assert bias(reference) == 1, "the reference is what SFT has made"
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    assert got_examples == examples and batch_size == 512

    settings = {"beta": 0.5, "loss": "sigmoid", "label_smoothing": 0.0, "epochs": 2,
                "batch_size": 64, "lr": 0.25, "seed": 3, "accumulate": 2}
    remedies = {"dpo": (1.0, 0.5), "plain": (0.0, 0.0)}
    trainings = sorted(notes[2:4], key=lambda note: note[2]["stage"])
    for (stage, (stray, nll)), (_, args, how) in zip(remedies.items(), trainings, strict=True):
        policy, got_examples, ref_logps, _ = args
        assert bias(policy) == 1 and all(p.requires_grad for p in policy.parameters())
        assert got_examples == examples and ref_logps == "the reference's log-probabilities"
        measure, ceiling = how.pop("measure"), how.pop("ceiling")
        assert how.pop("likely") is likely
        assert how == {"stage": stage, "stray_weight": stray, "nll_weight": nll, **settings}
        assert ceiling == toy_data.ceiling("human")
        held_out = world.prompts()[1]
        ref = evaluate.exact_logps(reference, held_out)
        with torch.no_grad():
            policy.ln_f.bias += 1
        assert measure(policy) == evaluate.measure(evaluate.exact_logps(policy, held_out), ref, 0.5)

    for name, want in (("sft", 1), *[(stage, 1 + more) for stage, more in MOVED.items()]):
        saved, facts = checkpoints.load_model(out / f"{name}.pt")
        assert bias(saved) == want and facts["flags"] == read_json(out / "flags.json"), name
        if name != "sft":
            assert facts["reference"] == checkpoints.fingerprint(reference)
    assert notes[4][1] == [out, "cpu"] and notes[5][1][0] == out
    summary = read_json(out / "summary.json")
    assert summary["a number"] == 1.5 and 0 < summary["seconds"] < 1e5
    assert f"Done in {summary['seconds']:.0f} s." in printed


def test_plain_dpo_alone_is_one_training(notes, tmp_path):
    """Without a remedy the main training is plain DPO. It is not run twice."""
    run(tmp_path / "run", "--pairs", "20", "--stray-weight", "0")
    assert names(notes).count("train_dpo") == 1
    run(tmp_path / "rpo", "--pairs", "20", "--stray-weight", "0", "--nll-weight", "0.5")
    stages = [how["stage"] for name, _, how in notes if name == "train_dpo"]
    assert sorted(stages) == ["dpo", "dpo", "plain"]


def test_what_is_there_is_not_trained_again(notes, tmp_path):
    """After an interruption: the reference and plain DPO are read, and only DPO is trained. It has
    one thread, as it would have had beside plain DPO. With two it would be rounded otherwise, and
    the run would not end as if nothing had happened."""
    out, before = tmp_path / "run", torch.get_num_threads()
    run(out, "--pairs", "20")
    for name in ("dpo.pt", "summary.json"):
        (out / name).unlink()
    notes.clear()
    threads.clear()
    torch.set_num_threads(2)
    run(out, "--pairs", "20", "--resume")
    assert torch.get_num_threads() == 2 and threads == [1]
    torch.set_num_threads(before)
    assert names(notes) == ["reference_logps", "train_dpo", "report", "draw_run"]
    assert bias(notes[0][1][0]) == 1 and notes[1][2]["stage"] == "dpo"


@pytest.mark.parametrize("longest", [20, 32, 33])
def test_a_run_on_ones_own_pairs(notes, tmp_path, longest):
    """Batches have the size that is asked for. The model reads the longest pair, in steps of 32
    tokens. There is no plain stage, no ceiling and no exact measurement."""
    file = tmp_path / "mine.jsonl"
    rows = []
    for i in range(20):
        length = longest if i in (3, 4) else 10  # a byte is a token here, and EOS is one
        rows.append({"prompt": f"{i:02}?", "chosen": "x" * (length - 4), "rejected": "no"})
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run(tmp_path / "run", "--data", str(file), "--nll-weight", "0.5", "--batch-size", "5")
    assert names(notes) == ["train_sft", "reference_logps", "train_dpo", "report", "draw_run"]
    _, [model, texts, _], how = notes[0]
    longest_kept = max(len(x) + len(y) for x, y in texts)
    assert longest_kept == longest, "the longest pair was held out: choose another row"
    assert model.config.block_size == 32 * math.ceil(longest / 32)
    assert how["batch_size"] == notes[1][1][2] == 5
    assert notes[2][2]["ceiling"] is None and notes[2][2]["measure"] is None
    assert notes[2][2]["stray_weight"] == 0 and notes[2][2]["nll_weight"] == 0.5


def test_given_weights_can_be_the_reference(notes, tmp_path):
    """--init with --sft-epochs 0: the weights of the file, and no SFT."""
    tokenizer = data.get_tokenizer("toy")
    start = GPT(GPTConfig(40, tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=32))
    checkpoints.save_model(start, tmp_path / "start.pt")
    run(tmp_path / "run", "--pairs", "20", "--init", str(tmp_path / "start.pt"),
        "--sft-epochs", "0")
    assert names(notes)[0] == "reference_logps"
    assert_same(notes[0][1][0].wte.weight, start.wte.weight, 0, what="the reference's weights")


def test_the_references_log_probabilities_stand_in_the_examples_order():
    """Seven pairs of different lengths, in batches of three, against one text after the other
    (1e-5, float32)."""
    tokenizer = data.get_tokenizer("toy")
    reference = GPT(GPTConfig(64, tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=32)).eval()
    examples, _ = data.tokenize(data.make_preferences(7), tokenizer)
    found = train.reference_logps(reference, examples, 3)
    assert [len(column) for column in found] == [7, 7]
    for i, e in enumerate(examples):
        for column, response in zip(found, (e.chosen, e.rejected)):
            logps = reference(torch.tensor([e.prompt + response]))[0].log_softmax(-1)  # (T, V)
            total = sum(logps[len(e.prompt) - 1 + t, y] for t, y in enumerate(response))
            assert_same(column[i], total, 1e-5, what=f"a response of example {i}")


def test_the_recorded_results_were_made_with_these_settings():
    """The README's table belongs to them. Who changes one makes the table anew: lab/tables.py."""
    recorded = read_json(flags.Path(train.__file__).parent / "docs" / "results.json")
    for summary in recorded["default"]:
        for name, value in flags.TOY.items():
            assert summary["flags"][name] == value, f"--{name.replace('_', '-')}"
    assert (train.SFT_TEXTS, train.SFT_BATCH, train.CLIP) == (48_000, 32, 10.0)
    assert train.MEASURE_AT == (0, 0.01, 0.03, 0.07, 0.15, 0.3, 0.6, 1), "shares of a training"
