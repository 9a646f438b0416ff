"""support/own_data.py: a user's pairs, with untrained models. A whole run on them is proved in
test_train.py, and reading and splitting a file in test_data.py."""
import hashlib
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

import data
from model import GPT, GPTConfig
from support import checkpoints, own_data
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
    """By hand: the prompts in the order of their digests, shuffled, and a tenth of them taken."""
    names = {}
    for prompt, chosen, rejected in rows:
        if chosen != rejected:
            hashed = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
            names[int.from_bytes(hashed, "big", signed=True)] = prompt
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return {names[sorted(names)[i]] for i in order[:round(len(names) / 10)]}


# ---- Before the training

ROWS = [(f"{i:02}?", f"yes {i}", f"no, {i}!") for i in range(40)]


def load(path, max_length=30, **options):
    return own_data.load(path, TOKENIZER, max_length, seed=3, **options)


def test_what_is_trained_on_and_what_is_left_out(tmp_path, capsys):
    """The train side of the split, less what is too long, in the file's order. The reference is
    fitted to its chosen responses. Whatever is left out is counted, and its place is named."""
    held_out = held_out_prompts(ROWS, 3)
    train = [i for i, row in enumerate(ROWS) if row[0] not in held_out]
    [*_, tried] = [i for i, row in enumerate(ROWS) if row[0] in held_out]
    rows = list(ROWS)
    for i in (*train[2:4], tried):
        rows[i] = (rows[i][0], "x " * (20 if i == train[2] else 18), "no")
    path = write(tmp_path / "mine.jsonl", rows)
    texts, examples = load(path)
    want = [rows[i] for i in train if i not in train[2:4]]
    assert [(e.prompt, e.chosen, e.rejected) for e in examples] == [
        (encode(x), encode(w) + [EOS], encode(l) + [EOS]) for x, w, l in want]
    assert list(texts) == [(e.prompt, e.chosen) for e in examples], "the chosen are learned"
    assert len(texts) == len(examples) == len(want)
    assert [examples.where(i) for i in range(len(want))] == [
        f"{path}, line {i + 1}" for i in train if i not in train[2:4]]
    fitting = [encode(x + w + l) for x, w, l in rows if "x x" not in w]
    assert len(examples.tokens) == sum(len(ids) + 2 for ids in fitting), "others take no memory"
    assert examples[-1] == list(examples)[-1] and texts.where(0) == examples.where(0)
    assert capsys.readouterr().out == (
        f"{path}: 40 pairs; 36 to train on, 4 held out (by prompt)\n"
        "Left out: 2 train pairs are longer than --max-length 30 tokens "
        f"(lines {train[2] + 1}, {train[3] + 1}; the longest of the file has 44)\n"
        "Left out: 1 held-out pairs are longer than --max-length 30 tokens "
        f"(line {tried + 1}; the longest of the file has 44)\n")
    assert len(encode(ROWS[0][0] + "x " * 20)) + 1 == 44


@pytest.mark.parametrize("equal", [0, 1, 2])
def test_pairs_that_teach_nothing_are_left_out(tmp_path, capsys, equal):
    rows = ROWS + [(f"{x}", "same", "same") for x in range(equal)]
    path = write(tmp_path / "mine.jsonl", rows)
    assert len(load(path)[1]) == 36
    left_out = (f"Left out: {equal} rows have chosen == rejected and can teach nothing "
                f"({'lines 41, 42' if equal > 1 else 'line 41'})\n")
    out = capsys.readouterr().out
    assert out == (f"{path}: {40 + equal} pairs; 36 to train on, 4 held out (by prompt)\n"
                   + (left_out if equal else ""))


def test_repeated_rows_are_kept_and_counted(tmp_path, capsys):
    """A row repeats another if prompt, chosen and rejected are the same. Then it counts twice."""
    repeated = next(row for row in ROWS if row[0] not in held_out_prompts(ROWS, 3))
    x, w, l = repeated
    path = write(tmp_path / "mine.jsonl", [*ROWS, repeated, repeated, (x, l, w), (x, w + l, l)])
    assert len(load(path)[1]) == 40
    assert capsys.readouterr().out.endswith(
        "Kept: 2 rows repeat an earlier one; each counts as often as it stands there\n")


def test_bad_rows_end_the_run_or_are_left_out(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", [*ROWS, ("p", "", "no"), ("", "yes", "no")])
    with pytest.raises(data.DataError, match="2 of 42 rows cannot be used"):
        load(path)
    assert len(load(path, skip_bad_rows=True)[1]) == 36
    assert capsys.readouterr().out == (
        f"{path}: 40 pairs; 36 to train on, 4 held out (by prompt)\n"
        "Left out: rows that cannot be used\n"
        "  1: chosen is empty (''), line 41\n  1: prompt is empty (''), line 42\n")


@pytest.mark.parametrize("n_vocab, size", [(2 ** 16, 2), (2 ** 16 + 1, 4)])
def test_a_token_is_held_in_two_bytes_or_four(tmp_path, monkeypatch, n_vocab, size):
    """The largest token of the vocabulary still fits. Lists of numbers would need 8 to 36 bytes."""
    tokenizer = SimpleNamespace(n_vocab=n_vocab, eot_token=n_vocab - 1, encode_ordinary=encode)
    _, examples = own_data.load(write(tmp_path / "mine.jsonl", ROWS), tokenizer, 30, 3)
    assert examples.tokens.itemsize == size
    assert {e.chosen[-1] for e in examples} == {n_vocab - 1}


@pytest.mark.parametrize("side", ["train", "held-out"])
def test_a_side_without_pairs_ends_the_run(tmp_path, side):
    held_out = held_out_prompts(ROWS, 3)
    rows = [(x, "x " * 20 if (x in held_out) == (side == "held-out") else w, l)
            for x, w, l in ROWS]
    path = write(tmp_path / "mine.jsonl", rows)
    with pytest.raises(data.DataError, match=f"no {side} pair is left. .* Raise --max-length") as e:
        load(path)
    assert str(path) in str(e.value) and f"{36 if side == 'train' else 4} are" in str(e.value)


def test_a_file_of_equal_answers_cannot_be_split(tmp_path):
    path = write(tmp_path / "mine.jsonl", [("a", "b", "b")])
    with pytest.raises(data.DataError, match="mine.jsonl: 0 different prompts"):
        load(path)


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
        with pytest.raises(SystemExit, match=f"--init {where}: "):
            own_data.load_init(where, TOKENIZER, 32)


# ---- After the training

@pytest.mark.parametrize("max_length, block", [(40, 60), (50, 40)])
def test_what_is_measured_is_what_was_held_out(tmp_path, monkeypatch, max_length, block):
    """Pairs that the run could be trained on, and the model can read, are scored. Prompts that
    leave a quarter of its block free are answered, in alphabetical order and at most 64 of them,
    with all the room that the longest leaves. What the file lost is counted. The rest is left to
    pair_metrics and sample_metrics."""
    rows = []
    for i in range(900):
        length = {0: block * 3 // 4, 1: block * 3 // 4 - 1}.get(i % 10, 10)
        length = min(length, 36)  # as long as pairs of 40 tokens allow
        rows.append((f"{i:03}" + "?" * (length - 3), "yes", "no" + " no" * (10 * (i % 7 == 0))))
    held_out = held_out_prompts(rows, 3)
    bad = [("", "a", "b")] * 3
    equal = [("p", "a", "a")] * 2
    path = write(tmp_path / "mine.jsonl", [*rows, *bad, *equal, rows[1]])
    flags = {"data": str(path), "seed": 3, "beta": 0.5, "max_length": max_length,
             "skip_bad_rows": True, "data_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    pairs = {}
    for x, w, l in rows:
        pair = data.Example(encode(x), encode(w) + [EOS], encode(l) + [EOS])
        if len(pair) <= 40:
            pairs[x] = pair
    want = [pair for x, pair in pairs.items() if x in held_out]
    fitting = sorted(x for x in pairs if x in held_out and len(encode(x)) < block * 3 / 4)
    longest = max(len(encode(x)) for x in fitting[:64])
    assert len(want) < len(held_out) == 90 and 64 < len(fitting)

    def pair_metrics(policy, ref, examples, *rest):
        assert (policy, ref, list(examples), rest) == ("policy", reference, want, (flags, "device"))
        return {"loss": (0.5, 0.1)}

    def sample_metrics(*args):
        assert args == ("policy", reference, fitting[:64], TOKENIZER, block - longest, "device")
        return {"kl": (1.5, 0.2)}
    monkeypatch.setattr(own_data, "pair_metrics", pair_metrics)
    monkeypatch.setattr(own_data, "sample_metrics", sample_metrics)
    reference = gpt(block_size=block)
    measured = own_data.measure("policy", reference, flags, TOKENIZER, "device")
    left_out = {"unusable": 3, "equal": 2, "too_long": len(rows) - len(pairs)}
    assert measured == ({"held_out_pairs": len(want), "beta": 0.5, "left_out": left_out,
                         "repeated": 1, "loss": (0.5, 0.1), "kl": (1.5, 0.2)}, fitting[:64])
    json.dumps(measured)  # it is written to a file

    path.write_text(path.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    with pytest.raises(data.DataError, match="has changed since the run was trained on it"):
        own_data.measure("policy", reference, flags, TOKENIZER, "device")


def test_where_every_prompt_is_long_the_shortest_is_answered(tmp_path, monkeypatch):
    rows = [(f"{i:02}" + "?" * (24 + (i * 7) % 5), "yes", "no") for i in range(40)]
    shortest = min(held_out_prompts(rows, 3), key=lambda x: (len(x), rows.index((x, "yes", "no"))))
    path = write(tmp_path / "mine.jsonl", rows)
    flags = {"data": str(path), "seed": 3, "beta": 0.5, "max_length": 40,
             "data_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    monkeypatch.setattr(own_data, "pair_metrics", lambda *args: {})
    asked = []
    monkeypatch.setattr(own_data, "sample_metrics", lambda *args: asked.append(args[2:5]) or {})
    _, prompts = own_data.measure("policy", gpt(block_size=32), flags, TOKENIZER, "device")
    assert asked == [([shortest], TOKENIZER, 32 - len(shortest))] and prompts == [shortest]


def test_a_run_without_the_flag_skips_no_row(tmp_path):
    path = write(tmp_path / "mine.jsonl", [*ROWS, ("", "yes", "no")])
    flags = {"data": str(path), "seed": 3, "beta": 0.5, "max_length": 40,
             "data_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with pytest.raises(data.DataError, match="line 41: prompt is empty"):
        own_data.measure("policy", gpt(), flags, TOKENIZER, "device")


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
    summary = {"held_out_pairs": 12, "beta": 0.5, "repeated": 4,
               "left_out": {"unusable": 1, "equal": 2, "too_long": 3},
               "accuracy": (0.75, 0.125), "loss": (0.625, 0.03),
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
        "left out of the file: 1 unusable, 2 with chosen == rejected, 3 too long; kept: 4 repeated",
    ]
