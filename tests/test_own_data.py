"""support/own_data.py: a user's pairs, with untrained models. A whole run on them is proved in
test_train.py, and reading and splitting a file in test_data.py."""
import hashlib
import json
import math
import statistics

import pytest
import torch

import data
from model import GPT, GPTConfig
from support import checkpoints, own_data, preferences
from tools import assert_same

TOKENIZER = data.get_tokenizer("toy")
EOS = TOKENIZER.eot_token


def encode(text):
    return TOKENIZER.encode_ordinary(text)


def write(path, rows):
    """A file of pairs. rows: a list of (prompt, chosen, rejected)."""
    keys = "prompt", "chosen", "rejected"
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def held_out_prompts(rows, seed):
    return {p.prompt for p in preferences.split([data.Pair(*row) for row in rows], seed)[1]}


# ---- Before the training

ROWS = [(f"{i:02}?", f"yes {i}", f"no, {i}!") for i in range(40)]


def load(path, max_length=30):
    return own_data.load(path, TOKENIZER, max_length, seed=3)


def test_what_is_trained_on_and_what_is_left_out(tmp_path, capsys):
    """The train side of the split, less what is too long, in the file's order. The reference is
    fitted to its chosen responses. Whatever is left out is counted, and its place is named."""
    held_out = held_out_prompts(ROWS, 3)
    train = [i for i, row in enumerate(ROWS) if row[0] not in held_out]
    [*_, tried] = [i for i, row in enumerate(ROWS) if row[0] in held_out]
    rows = list(ROWS)
    for i in (*train[2:4], tried):
        rows[i] = (rows[i][0], "x " * 20, "no")
    path = write(tmp_path / "mine.jsonl", rows)
    texts, examples = load(path)
    want = [rows[i] for i in train if i not in train[2:4]]
    assert [(e.prompt, e.chosen, e.rejected) for e in examples] == [
        (encode(x), encode(w) + [EOS], encode(l) + [EOS]) for x, w, l in want]
    assert texts == [(e.prompt, e.chosen) for e in examples], "the reference learns the chosen"
    assert capsys.readouterr().out == (
        f"{path}: 40 pairs; 36 to train on, 4 held out (by prompt)\n"
        "Left out: 2 train pairs are longer than --max-length 30 tokens "
        f"({path}, line {train[2] + 1}, ...)\n"
        "Left out: 1 held-out pairs are longer than --max-length 30 tokens "
        f"({path}, line {tried + 1})\n")


@pytest.mark.parametrize("equal", [0, 1, 2])
def test_pairs_that_teach_nothing_are_left_out(tmp_path, capsys, equal):
    rows = ROWS + [(f"{x}", "same", "same") for x in range(equal)]
    path = write(tmp_path / "mine.jsonl", rows)
    assert len(load(path)[1]) == 36
    left_out = (f"Left out: {equal} rows have chosen == rejected and can teach nothing "
                f"({path}, line 41{', ...' if equal > 1 else ''})\n")
    out = capsys.readouterr().out
    assert out == (f"{path}: {40 + equal} pairs; 36 to train on, 4 held out (by prompt)\n"
                   + (left_out if equal else ""))


@pytest.mark.parametrize("side", ["train", "held-out"])
def test_a_side_without_pairs_ends_the_run(tmp_path, side):
    held_out = held_out_prompts(ROWS, 3)
    rows = [(x, "x " * 20 if (x in held_out) == (side == "held-out") else w, l)
            for x, w, l in ROWS]
    with pytest.raises(data.DataError, match=f"no {side} pair is left. Raise --max-length"):
        load(write(tmp_path / "mine.jsonl", rows))


def gpt(vocab_size=TOKENIZER.n_vocab, block_size=32):
    """An untrained model in float64 whose tokens are far from equally likely."""
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=1, n_head=1, n_embd=8)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def test_weights_to_begin_with(tmp_path, monkeypatch):
    """A checkpoint, or GPT-2's weights by whatever else is named. They must have the tokenizer's
    vocabulary and read the longest pair."""
    start, asked = gpt(), []

    def from_pretrained(where):
        asked.append(where)
        if where == "gpt5":
            raise ValueError("gpt5 is unknown")
        return start
    monkeypatch.setattr(GPT, "from_pretrained", from_pretrained)
    file = tmp_path / "start.pt"
    checkpoints.save_model(start, file)
    for longest in (31, 32):
        loaded = own_data.load_init(str(file), TOKENIZER, longest)
        assert_same(loaded.wte.weight, start.wte.weight.float(), 0, what="the weights")
        assert asked == []
    assert own_data.load_init("gpt2", TOKENIZER, 32) is start and asked == ["gpt2"]
    with pytest.raises(SystemExit, match="reads 32 tokens.* has 33: set --max-length 32"):
        own_data.load_init(file, TOKENIZER, 33)
    checkpoints.save_model(gpt(vocab_size=9), file)
    with pytest.raises(SystemExit, match=f"has 9 tokens, --tokenizer toy has {EOS + 1}"):
        own_data.load_init(file, TOKENIZER, 32)
    for where in ("gpt5", tmp_path / "absent.pt"):
        with pytest.raises(SystemExit, match=f"--init: .*{where}"):
            own_data.load_init(where, TOKENIZER, 32)


# ---- After the training

def test_what_is_measured_is_what_was_held_out(tmp_path, monkeypatch):
    """Pairs that the model can read are scored. Prompts that leave a quarter of its block free are
    answered, in alphabetical order and at most 64 of them, with all the room that the longest
    leaves. The rest is left to pair_metrics and sample_metrics."""
    rows = []
    for i in range(900):
        length = {0: 30, 1: 29}.get(i % 10, 10)
        rows.append((f"{i:03}" + "?" * (length - 3), "yes", "no" + " no" * (10 * (i % 7 == 0))))
    assert [len(encode(row[0])) for row in rows[:3]] == [30, 29, 10]
    held_out = held_out_prompts(rows, 3)
    path = write(tmp_path / "mine.jsonl", rows)
    flags = {"data": str(path), "seed": 3, "beta": 0.5,
             "data_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    want = []
    for x, w, l in rows:
        pair = data.Example(encode(x), encode(w) + [EOS], encode(l) + [EOS])
        if x in held_out and len(pair) <= 40:
            want.append(pair)
    answered = sorted(x for x in held_out if len(encode(x)) < 30)[:64]
    assert len(want) < len(held_out) == 90 and max(map(len, map(encode, answered))) == 29
    assert answered != sorted(x for x in held_out if len(encode(x)) < 30), "64 is not reached"

    def pair_metrics(*args):
        assert args == ("policy", reference, want, flags, "device")
        return {"loss": (0.5, 0.1)}

    def sample_metrics(*args):
        assert args == ("policy", reference, answered, TOKENIZER, 40 - 29, "device")
        return {"kl": (1.5, 0.2)}
    monkeypatch.setattr(own_data, "pair_metrics", pair_metrics)
    monkeypatch.setattr(own_data, "sample_metrics", sample_metrics)
    reference = gpt(block_size=40)
    measured = own_data.measure("policy", reference, flags, TOKENIZER, "device")
    assert measured == ({"held_out_pairs": len(want), "beta": 0.5, "loss": (0.5, 0.1),
                         "kl": (1.5, 0.2)}, answered)

    path.write_text(path.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    with pytest.raises(data.DataError, match="has changed since the run was trained on it"):
        own_data.measure("policy", reference, flags, TOKENIZER, "device")


def assert_means(found, columns, tolerance=1e-5):
    """Each pair of numbers is the mean of a column and its standard error."""
    assert found.keys() == columns.keys()
    for name, column in columns.items():
        want = statistics.fmean(column), statistics.stdev(column) / math.sqrt(len(column))
        assert found[name] == pytest.approx(want, abs=tolerance), name


def token_logps(model, prompt, response):
    """log pi(. | x, y_<t) before each token of a response, (T,V)."""
    logps = model(torch.tensor([prompt + response]))[0].softmax(-1).log()
    return logps[len(prompt) - 1:-1]


def logp(model, prompt, response):
    rows = token_logps(model, prompt, response)
    return sum(row[y].item() for row, y in zip(rows, response, strict=True))


@torch.no_grad()
def test_the_figures_of_pairs_by_plain_sums(monkeypatch):
    """Nineteen pairs, one text after the other (1e-5, float32), scored at most 16 at a time.
    Label smoothing counts for the losses that have it. Where the policy is the reference, the loss
    is ln 2, every reward is 0 and the accuracy is 1/2: a tie counts half."""
    policy, reference, beta, smoothing = gpt(), gpt(), 0.5, 0.2
    examples = []
    for i in range(19):
        answers = [encode(f"yes {i}") + [EOS], encode(f"no, {i}!") + [EOS]]
        examples.append(data.Example(encode("?" * (1 + i % 3)), *answers[::(-1) ** i]))
    rewards = []
    for e in examples:
        rewards.append([beta * (logp(policy, e.prompt, y) - logp(reference, e.prompt, y))
                        for y in (e.chosen, e.rejected)])
    right = [math.log1p(math.exp(l - w)) for w, l in rewards]
    flipped = [math.log1p(math.exp(w - l)) for w, l in rewards]
    want = {"accuracy": [float(w > l) for w, l in rewards], "margin": [w - l for w, l in rewards],
            "chosen_reward": [w for w, _ in rewards], "rejected_reward": [l for _, l in rewards]}
    assert 0 < statistics.fmean(want["accuracy"]) < 1

    collate, sizes = data.collate, []

    def note(batch, **kwargs):
        sizes.append(len(batch))
        return collate(batch, **kwargs)
    monkeypatch.setattr(data, "collate", note)
    for name in ("sigmoid", "cdpo"):
        flags = {"loss": name, "label_smoothing": smoothing, "beta": beta}
        share = smoothing if name == "cdpo" else 0
        want["loss"] = [(1 - share) * a + share * b for a, b in zip(right, flipped)]
        sizes.clear()
        assert_means(own_data.pair_metrics(policy, reference, examples, flags, "cpu"), want)
        assert sizes == [16, 3], "more pairs at a time need more memory"
        same = own_data.pair_metrics(policy, policy, examples, flags, "cpu")
        assert same == {"loss": pytest.approx((math.log(2), 0), abs=1e-6), "accuracy": (0.5, 0),
                        "chosen_reward": (0, 0), "rejected_reward": (0, 0), "margin": (0, 0)}


@torch.no_grad()
def test_the_figures_of_samples_by_plain_sums(monkeypatch):
    """Ten prompts, eight at a time. A sample's KL is the exact KL of the next token, summed over
    the sample's tokens, one text after the other (1e-5, float32)."""
    policy, reference = gpt(), gpt()
    prompts = ["?" * (k + 1) for k in range(10)]
    samples = {}
    for k, x in enumerate(prompts):
        samples[x] = [5 + k + i for i in range(k % 4)] + [EOS if k % 3 else 7]
    left = list(prompts)

    def generate(ids, max_new_tokens, eos_id):
        assert (max_new_tokens, eos_id) == (6, EOS)
        here = [left.pop(0) for _ in ids]
        assert ids == [encode(x) for x in here], "the prompts are answered in their order"
        batches.append(len(ids))
        return [samples[x] for x in here]
    batches, bars = [], []

    def bar(batches, **settings):
        bars.append(settings)
        return batches
    monkeypatch.setattr(policy, "generate", generate)
    monkeypatch.setattr(own_data, "tqdm", bar)
    found = own_data.sample_metrics(policy, reference, prompts, TOKENIZER, 6, "cpu")
    assert batches == [8, 2] and not left
    assert bars == [{"desc": "  sample", "unit": "batch", "dynamic_ncols": True}]

    columns = {"kl": [], "tokens": [], "ended": []}
    for x, y in samples.items():
        p, q = token_logps(policy, encode(x), y), token_logps(reference, encode(x), y)  # (T, V)
        kl = [math.exp(a) * (a - b) for a, b in zip(p.flatten().tolist(), q.flatten().tolist())]
        columns["kl"].append(math.fsum(kl))
        columns["tokens"].append(len(y))
        columns["ended"].append(float(y[-1] == EOS))
    assert_means(found, columns)


def test_the_closing_table():
    """Every figure stands in its row, with its error and with what it can be compared with."""
    summary = {"held_out_pairs": 12, "beta": 0.5, "accuracy": (0.75, 0.125), "loss": (0.625, 0.03),
               "margin": (1.5, 0.25), "chosen_reward": (-0.5, 0.2), "rejected_reward": (-2, 0.4),
               "kl": (3.25, 0.5), "tokens": (14.5, math.nan), "ended": (1, 0)}
    assert own_data.table(summary).split("\n") == [
        "held out: 12 pairs                                mean     +- SE   compare with",
        "preference accuracy (by implicit reward)         0.750     0.125   50% by chance",
        "DPO loss, nats                                   0.625     0.030   "
        "ln 2 = 0.6931 at the start",
        "reward margin                                    1.500     0.250   0 at the start",
        "implicit reward of chosen                       -0.500     0.200   0 at the start",
        "implicit reward of rejected                     -2.000     0.400   0 at the start",
        "KL(policy || reference), nats, sampled           3.250     0.500   0 at the start",
        "tokens a sampled response                       14.500       nan",
        "share that ended in EOS                          1.000     0.000",
    ]
