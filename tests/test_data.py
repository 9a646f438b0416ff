"""data.py and users' files: tokens, masks, batches, the toy data, and files of pairs."""
import bisect
import gzip
import itertools
import json
import math
import os
import re

import pytest
import torch
from tqdm import tqdm

import data
import fuzz_files
import world
from conftest import ROOT
from data import DataError, Example, Pair, collate, load_preferences
from support import preferences
from support.preferences import (
    digest,
    hold_out,
    leave_out_equal,
    read_rows,
    save_preferences,
    show,
)

TOY = data.get_tokenizer("toy")


# ---- Tokenizers

@pytest.mark.parametrize("text", [
    "",
    " superb and scary. I loved it.",
    "naïve 日本 \U0001f600\r\n\t  two  spaces",
    bytes(range(256)).decode("latin-1"),
    "<|endoftext|>",
    "superbly",
    "a" * 300,
])
def test_toy_tokenizer_writes_any_text(text):
    ids = TOY.encode_ordinary(text)
    assert TOY.decode(ids) == text
    assert TOY.eot_token not in ids, "a text that spells EOS holds no EOS"


def test_toy_words_are_one_token_each():
    train, held_out = world.prompts()
    for text in train + held_out + world.responses()[::7]:
        ids = TOY.encode_ordinary(text)
        assert len(ids) == len(re.findall(r" ?\w+|[^\w\s]", text))
        assert all(i >= 256 or TOY.decode([i]) in ".,:" for i in ids)


def test_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="'bert'"):
        data.get_tokenizer("bert")


# ---- Masks and batches

def test_oracle_collate():
    """By hand (claims: "Oracles with numbers"): the chosen rows come first, then the rejected
    ones, all padded with 0 to the longest row of the batch."""
    examples = [Example([1, 2, 3], [4, 5], [6]), Example([7, 8], [9, 10], [11, 12, 13])]
    batch = collate(examples)
    assert batch["tokens"].tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 9, 10, 0],
        [1, 2, 3, 6, 0],
        [7, 8, 11, 12, 13]]
    assert batch["response_mask"].int().tolist() == [
        [0, 0, 0, 1, 1],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 1, 1]]
    tokens, _ = data.pad([[1, 2, 3], [7, 8]], [[4, 5], [9, 10]])
    assert torch.equal(tokens, batch["tokens"][:2]), "pad pads with something else than collate"


@pytest.mark.parametrize("pad_id", [0, TOY.eot_token])
def test_mask_comes_from_lengths_not_from_ids(pad_id):
    """Here EOS is also the id of the padding. A mask made from ids would hide the real EOS, and
    the model would never learn to stop."""
    pair = Pair("comedy: the plot was", " dull.", " superb and scary. I loved it.")
    examples, _ = data.tokenize([pair], TOY)
    batch = collate(examples, pad_id)
    lengths = 3, 9  # " dull", ".", EOS; and 8 tokens with EOS after them
    for row, mask, n in zip(batch["tokens"], batch["response_mask"], lengths):
        assert mask.sum() == n
        assert row[mask][-1] == TOY.eot_token
        assert (row[mask] == TOY.eot_token).sum() == 1


@pytest.mark.parametrize("prompt, response", [
    ("The price is ", "$46"), ("a ", " b"), ("in", "put"), ("x\n", "\ny"), ("1", "23"),
    ("very fun", "ny"),
])
def test_the_border_between_prompt_and_response_never_merges(prompt, response):
    tokenizers = [TOY]
    if os.environ.get("TIKTOKEN_CACHE_DIR"):
        tokenizers.append(data.get_tokenizer("gpt2"))
    for tokenizer in tokenizers:
        (example,), _ = data.tokenize([Pair(prompt, response, "no")], tokenizer)
        assert example.prompt == tokenizer.encode_ordinary(prompt)
        assert tokenizer.decode(example.chosen[:-1]) == response
        assert example.chosen[-1] == tokenizer.eot_token


def test_too_long_pairs_are_handed_back_whole():
    """Prompt, response and EOS have 3, 10 and 11 tokens. At most 10 are allowed."""
    short, fits, long = [Pair("a", "b", "c" * n) for n in (1, 8, 9)]
    examples, too_long = data.tokenize([short, fits, long], TOY, max_length=10)
    assert [len(e) for e in examples] == [3, 10], "10 tokens are not more than 10"
    assert too_long == [long]


def epoch_by_hand(lengths, batch_size, seed):
    """The batches of an epoch: one shuffle, one sort of all places by three keys, one cut, and a
    shuffle of the batches."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()

    def key(place):
        return place // (50 * batch_size), lengths[shuffled[place]] // 32, place
    indices = [shuffled[place] for place in sorted(range(len(lengths)), key=key)]
    cut = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


def padding_factor(batches, lengths):
    """Positions in the padded batches, for each real token."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return padded / sum(lengths)


@pytest.mark.parametrize("n, batch_size", [(1003, 16), (1003, 4), (600, 4), (3, 4)])
def test_batches_hold_every_index_once_and_repeat_with_the_seed(n, batch_size):
    """Equal to `epoch_by_hand`, batch by batch, with 2, 6, 3 and 1 windows of 50 batches."""
    lengths = torch.randint(5, 300, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = data.batches(lengths, batch_size, seed=3)
    assert sorted(sum(batches, [])) == list(range(n)), "an index is lost, or comes twice"
    assert batches == epoch_by_hand(lengths, batch_size, seed=3), \
        "every index comes once, but in another order: another seed, window or bucket?"
    if batch_size == 16:
        in_order = [list(range(i, min(i + 16, n))) for i in range(0, n, 16)]
        assert padding_factor(batches, lengths) < 1.2 < padding_factor(in_order, lengths), \
            "grouping by length saves most of the padding"


def test_toy_batches_mix_lengths():
    """Batches of one length each would make the gradient swing with the length. The toy texts
    have 14 to 20 tokens and must be drawn together."""
    examples, _ = data.tokenize(data.make_preferences(640), TOY)
    first = data.batches([len(e) for e in examples], 64, seed=0)[0]
    assert len({len(examples[i]) for i in first}) > 2


def test_each_epoch_of_each_seed_has_an_order_of_its_own():
    """Epoch e of seed s is `data.batches` with the seed 1000 s + e. So below 1000 epochs no order
    comes twice."""
    lengths = list(range(5, 108))
    by_hand = [data.batches(lengths, 16, k) for k in (3000, 3001, 3002)]
    assert by_hand[0] != by_hand[1] != by_hand[2] != by_hand[0]
    assert data.epochs(lengths, 16, seed=3, n=3) == sum(by_hand, [])
    assert data.epochs(lengths, 16, seed=3, n=0) == []


# ---- The toy data

def draws_by_hand(logps, prompts, generator):
    """One response number for each prompt number, by inverse transform: the first one up to which
    the probabilities add to a share u of the whole, u uniform."""
    cdfs = [list(itertools.accumulate(map(math.exp, row))) for row in logps.tolist()]
    uniform = torch.rand(len(prompts), generator=generator, dtype=torch.float64).tolist()
    return [bisect.bisect_left(cdfs[x], u * cdfs[x][-1]) for x, u in zip(prompts, uniform)]


def test_draw_is_the_inverse_transform():
    """Equal to `draws_by_hand`. The rows need not add to 1, and may hold impossible responses."""
    logps = torch.tensor([[0.5, 0.0, 0.25, 0.0], [0.0, 3.0, 1.0, 4.0]], dtype=torch.float64).log()
    prompts = [0, 1, 1] * 100
    drawn = data.draw(logps, torch.tensor(prompts), torch.Generator().manual_seed(2)).tolist()
    assert drawn == draws_by_hand(logps, prompts, torch.Generator().manual_seed(2))
    assert {*zip(prompts, drawn)} == {(0, 0), (0, 2), (1, 1), (1, 2), (1, 3)}


def pairs_by_hand(n, score, seed):
    """n preference pairs, one after the other: two different responses, and Eq. 1 says with which
    probability the first of them is preferred."""
    train, _ = world.prompts()
    texts, logps = world.responses(), world.grammar_logps(train)
    generator = torch.Generator().manual_seed(seed)
    prompts = [i % len(train) for i in range(n)]
    first = draws_by_hand(logps, prompts, generator)
    second = draws_by_hand(logps, prompts, generator)
    while again := [i for i in range(n) if first[i] == second[i]]:
        drawn = draws_by_hand(logps, [prompts[i] for i in again], generator)
        for i, y in zip(again, drawn):
            second[i] = y
    pairs = []
    for x, y_1, y_2, u in zip(prompts, first, second,
                              torch.rand(n, generator=generator, dtype=torch.float64).tolist()):
        prompt, a, b = train[x], texts[y_1], texts[y_2]
        p = 1 / (1 + math.exp(score(prompt, b) - score(prompt, a)))  # Eq. 1
        pairs.append(Pair(prompt, a, b) if u < p else Pair(prompt, b, a))
    return pairs


def test_preferences_are_draws_from_the_grammar_and_from_eq_1():
    """Equal to `pairs_by_hand`. So a seed fixes the pairs, every annotator compares the same
    responses, and no prompt is held out. The labels of a human, from seed 0, are the default."""
    pairs = data.make_preferences(2000)
    assert pairs == pairs_by_hand(2000, world.true_reward, seed=0), \
        "equal responses, labels the wrong way round, or random numbers in another order?"
    assert [p.where for p in pairs[:2]] == ["toy pair 0", "toy pair 1"]
    assert data.make_preferences(1000, "ai", seed=5) == pairs_by_hand(1000, world.ai_score, seed=5)


def test_the_sft_corpus_is_drawn_from_the_grammar():
    """Equal to `draws_by_hand`, for the train prompts in turn."""
    train, texts = world.prompts()[0], world.responses()
    prompts = [i % len(train) for i in range(500)]
    which = draws_by_hand(world.grammar_logps(train), prompts, torch.Generator().manual_seed(6))
    assert data.make_sft_corpus(500, seed=6) == [(train[x], texts[y])
                                                 for x, y in zip(prompts, which)]


def test_written_pairs_read_back_and_nothing_is_overwritten(tmp_path):
    """A file holds one JSON object a line, and its text can be read: UTF-8, without escapes."""
    path = tmp_path / "p.jsonl"
    pairs = [Pair("naïve", " 日本", " \u2028b"), Pair("a", "b", "\nc")]
    save_preferences(pairs, path)
    assert path.read_bytes().decode("utf-8") == (
        '{"prompt": "naïve", "chosen": " 日本", "rejected": " \u2028b"}\n'
        '{"prompt": "a", "chosen": "b", "rejected": "\\nc"}\n')
    assert load_preferences(str(path)) == pairs
    with pytest.raises(FileExistsError):
        save_preferences(pairs, path)


# ---- Users' files

def write(path, *rows):
    """Write rows to a file, one a line: texts as they are, anything else as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: I think "
HI = "\n\nHuman: Hi\n\nAssistant:"


def test_plain_form_in_every_container(tmp_path):
    expected = [Pair("p", "c", "r"), Pair("q", "c", "r")]
    rows = [ROW, ROW | {"prompt": "q", "score": 3}]
    assert load_preferences(write(tmp_path / "a.jsonl", *rows, "")) == expected
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    assert load_preferences(tmp_path / "a.json") == expected
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write("\n".join(map(json.dumps, rows)))
    assert load_preferences(tmp_path / "a.jsonl.gz") == expected
    # a byte order mark, the line ends of Windows, and empty lines
    lines = [b"\xef\xbb\xbf", json.dumps(rows[0]).encode(), b" ", json.dumps(rows[1]).encode()]
    (tmp_path / "bom.jsonl").write_bytes(b"\r\n".join([lines[0] + lines[1], *lines[2:], b""]))
    assert load_preferences(tmp_path / "bom.jsonl") == expected
    assert [p.where[-6:] for p in load_preferences(tmp_path / "bom.jsonl")] == ["line 1", "line 3"]
    (tmp_path / "bom.json").write_bytes(lines[0] + b"[" + lines[1] + b",\r\n\r\n" + lines[3] + b"]")
    assert load_preferences(tmp_path / "bom.json") == expected
    assert [p.where[-6:] for p in load_preferences(tmp_path / "bom.json")] == ["item 1", "item 2"]


@pytest.mark.parametrize("text", [
    "a\u2028b\x85c\x0bd\x1ce",  # Python takes these for line ends, a file does not
    "\0", "a\0b", "\ufeff", "\U0001f469\u200d\U0001f680", "\u05e9\u05dc\u05d5\u05dd \u202etxt",
    "<|endoftext|>", "x" * 499_999, "\t" * 100_000 + "x",
])
def test_any_text_comes_through_as_it_is(tmp_path, text):
    """In the file, as characters and as JSON's escapes, and in the tokens of both tokenizers. No
    text holds EOS but at the end of a response, not even the text that spells it."""
    row = {"prompt": text, "chosen": "c" + text, "rejected": "r" + text}
    for ascii in (True, False):
        file = write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=ascii))
        pair, = load_preferences(file)
        assert pair == Pair(**row)
    for name in ("toy", "gpt2") if os.environ.get("TIKTOKEN_CACHE_DIR") else ("toy",):
        tokenizer = data.get_tokenizer(name)
        (example,), _ = data.tokenize([pair], tokenizer)
        for ids, wanted in ((example.prompt, text), (example.chosen[:-1], row["chosen"])):
            assert tokenizer.decode(ids) == wanted
            assert tokenizer.eot_token not in ids


@pytest.mark.parametrize("row, expected", [
    # Anthropic HH: the answers share "I think", which is no part of the prompt
    ({"chosen": HH + "so.", "rejected": HH + "not."},
     (HH[:-len(" I think ")], " I think so.", " I think not.")),
    # any other text: the common prefix, back to a whole word
    ({"chosen": "the cat sat", "rejected": "the car sat"}, ("the", " cat sat", " car sat")),
    ({"chosen": "the cart", "rejected": "the care"}, ("the", " cart", " care")),
    # messages: with the prompt apart, inside both answers, and as a text beside them
    ({"prompt": [user("Hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
     (HI, " yes", " no")),
    ({"chosen": [user("Hi"), assistant("yes")], "rejected": [user("Hi"), assistant("no")]},
     (HI, " yes", " no")),
    ({"prompt": "Hi", "chosen": [user("Hi"), assistant("yes")],
      "rejected": [user("Hi"), assistant("no")]},
     (HI, " yes", " no")),
    # ... inside both answers and apart as well; called "messages"; one object instead of a list
    ({"prompt": [user("Hi")], "chosen": [user("Hi"), assistant("yes")],
      "rejected": [user("Hi"), assistant("no")]}, (HI, " yes", " no")),
    ({"messages": [user("Hi")], "chosen": assistant("yes"), "rejected": assistant("no")},
     (HI, " yes", " no")),
    ({"prompt": user("Hi"), "messages": "ignored", "chosen": [assistant("yes")],
      "rejected": assistant("no")}, (HI, " yes", " no")),
    ({"prompt": [{"role": "system", "content": "Be brief."}, user("Hi")],
      "chosen": [assistant("yes")], "rejected": [assistant("no")]},
     ("\n\nSystem: Be brief." + HI, " yes", " no")),
    # the same answer twice is still an answer
    ({"chosen": [user("Hi"), assistant("yes")], "rejected": [user("Hi"), assistant("yes")]},
     (HI, " yes", " yes")),
])
def test_dialogue_forms(tmp_path, row, expected):
    pair, = load_preferences(write(tmp_path / "a.jsonl", row))
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


@pytest.mark.parametrize("row, message", [
    ('{"prompt": "p", ', "not JSON"),
    ("[1, 2]", "not an object"),
    ({"prompt": "p", "chosen": "c"}, "no 'rejected'"),
    ({"prompt": "p"}, "no 'chosen'"),
    (ROW | {"chosen": None}, r"chosen is neither a text.*\(None\)"),
    (ROW | {"prompt": 3}, r"prompt is neither a text.*\(3\)"),
    (ROW | {"prompt": None}, r"prompt is neither a text.*\(None\)"),
    (ROW | {"prompt": math.nan}, r"prompt is neither a text.*\(nan\)"),
    (ROW | {"prompt": 3, "chosen": [assistant("c")], "rejected": [assistant("r")]}, "prompt is"),
    (ROW | {"rejected": "  "}, r"rejected is empty \('  '\)"),
    (ROW | {"chosen": "x" * 500_001}, "chosen has more than 500,000 characters"),
    ({"prompt": "", "chosen": "", "rejected": "r"}, "prompt is empty"),
    (ROW | {"chosen": "c\ud800"}, "chosen holds half of a surrogate"),
    (ROW | {"rejected": "\udfffr"}, "rejected holds half of a surrogate"),
    ({"chosen": "abc", "rejected": "xyz"}, "do not begin alike"),
    (ROW | {"chosen": [assistant("c")]}, "chosen is neither a text"),
    (ROW | {"rejected": [assistant("r")]}, "rejected is neither a text"),
    ({"chosen": [{"role": "bot", "content": "x"}], "rejected": ["r"]}, "message .*'role': 'bot'"),
    ({"chosen": [{"role": [], "content": "x"}], "rejected": ["r"]}, r"message .*'role': \[\]"),
    ({"chosen": [{"from": "human", "value": "x"}], "rejected": ["r"]}, "message is not {'role'"),
    ({"chosen": [assistant("c")], "rejected": ["r"]}, r"message .*\('r'\)"),
    ({"chosen": [assistant(3)], "rejected": [assistant("r")]}, "message .*'content': 3"),
    ({"prompt": [user(4)], "chosen": [assistant("c")], "rejected": [assistant("r")]},
     "message .*'content': 4"),
    ({"prompt": "Bye", "chosen": [user("Hi"), assistant("y")],
      "rejected": [user("Hi"), assistant("n")]}, r"prompt is not the message before .*\('Bye'\)"),
    ({"prompt": "y", "chosen": [assistant("y")], "rejected": [assistant("n")]},
     r"prompt is not the message before .*\('y'\)"),
    ({"chosen": [], "rejected": []}, "chosen must end in exactly one assistant"),
    ({"chosen": [assistant("y")], "rejected": [assistant("n")]}, "no prompt message"),
    ({"prompt": [user("Hi")], "chosen": [assistant("y"), user("and?")],
      "rejected": [assistant("n"), user("and?")]}, "chosen must end in exactly one assistant"),
    ({"chosen": [user("Hi"), assistant("y")],
      "rejected": [user("Hi"), assistant("y"), user("and?")]},
     "rejected must end in exactly one assistant"),
    # what JSON allows, or Python's reader of it
    ("[" * 100_000, r"nested too deeply \(more brackets"),
    ("\ufeff" + json.dumps(ROW), "not JSON .*BOM"),  # not at the beginning of the file
    ('{"chosen": ' + "9" * 5000 + "}", "a number with thousands of digits"),
    ('{"prompt": "p", "chosen": "c", "rejected": "r", "chosen": "d"}', r"twice \('chosen'\)"),
    # another name of a column; a misspelt prompt must not make a dialogue of the row
    ({"promt": "p", "chosen": "p c", "rejected": "p r"},
     r"no 'prompt' \(the keys are .*; rename 'promt' to 'prompt', or remove it\)"),
    ({" Prompt": "p", "chosen": "p c", "rejected": "p r"}, "rename ' Prompt' to 'prompt'"),
    ({"question": "p", "query": "p", "chosen": "p c", "rejected": "p r"},
     r"; rename 'question' to 'prompt', or remove it\)"),
    ({"prompt": "p", "Chosen": "c", "rejected": "r"}, "no 'chosen'.* rename 'Chosen' to 'chosen'"),
    ({"prompt": "p", "winner": "c", "loser": "r"}, "no 'chosen'.* rename 'winner' to 'chosen'"),
    ({"prompt": "p", "chosen": "c", "loser": "r"}, "no 'rejected'.* rename 'loser' to 'rejected'"),
    ({"prompt": "p", "text": "c", "rejected": "r"}, r"no 'chosen' \([^;]*\)"),
    (ROW | {"input": "A text."}, "'input' would be lost"),
    (ROW | {"system": "Be brief."}, "'system' would be lost.*'Be brief.'.* in front of the prompt"),
])
def test_a_bad_row_is_named_with_file_line_and_value(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", ROW, "", row)
    with pytest.raises(DataError, match=message) as error:
        load_preferences(path)
    assert f"{path}, line 3: " in str(error.value), "blank lines count as lines"
    assert "Repair it, or add --skip-bad-rows" in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path)), "a long value must be cut"
    bad = {}
    rows = list(read_rows(path, skip_bad_rows=True, bad=bad))
    assert rows == [(1, *ROW.values())] and [numbers for _, numbers in bad.values()] == [[3]]


def test_columns_that_are_like_the_three_are_no_obstacle(tmp_path):
    """The columns of UltraFeedback, and the dialogue form beside an id."""
    row = ROW | {"prompt_id": "1", "messages": [], "score_chosen": 1, "system": ""}
    file = write(tmp_path / "a.jsonl", row, {"chosen": "a b", "rejected": "a c", "prompt_id": 1})
    assert load_preferences(file) == [Pair("p", "c", "r"), Pair("a", " b", " c")]


def test_all_bad_rows_are_listed_at_once_by_reason(tmp_path):
    """How many of how many, the first five lines of each reason, and what the first one holds."""
    empty, good = ROW | {"chosen": ""}, [ROW] * 1200
    path = write(tmp_path / "a.jsonl", *[empty] * 7, "oops", *good, "{}", empty)
    with pytest.raises(DataError) as error:
        load_preferences(path)
    assert str(error.value) == (
        f"{path}: 10 of 1,210 rows cannot be used.\n"
        "  8: chosen is empty (''), lines 1, 2, 3, 4, 5, ...\n"
        "  1: not JSON (Expecting value at character 1 of 'oops'), line 8\n"
        "  1: no 'chosen' (the keys are []), line 1209\n"
        "Repair them, or add --skip-bad-rows, which leaves out and counts what cannot be used.")
    assert [n for n, *_ in read_rows(path, skip_bad_rows=True)] == list(range(9, 1209))


def test_a_file_without_a_usable_row_is_an_error(tmp_path):
    """Also where bad rows are skipped. After a hundred of them a file is read no further, unless
    they are to be skipped."""
    path = write(tmp_path / "a.jsonl", *[{"q": "p", "chosen": "c"}] * 300)
    with pytest.raises(DataError) as error:
        load_preferences(path)
    assert str(error.value).startswith(f"{path}: the first 100 rows cannot be used.\n"
                                       "  100: no 'rejected' (the keys are ['q', 'chosen'])")
    with pytest.raises(DataError, match="300 of 300 rows cannot be used.\n.*\nRepair them.$"):
        list(read_rows(path, skip_bad_rows=True))
    write(path, *[{}] * 100, ROW)
    with pytest.raises(DataError, match="the first 100 .*\n.*\n.* add --skip-bad-rows"):
        load_preferences(path)
    assert list(read_rows(path, skip_bad_rows=True)) == [(101, *ROW.values())]


def test_a_file_is_read_as_a_stream(tmp_path):
    """The first rows are there before the last lines are read, which here are no gzip."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROW).encode() + b"\n") + b"no gzip")
    rows = read_rows(path)
    assert next(rows) == (1, "p", "c", "r")
    with pytest.raises(DataError, match="cannot be read"):
        next(rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_bar_counts_the_bytes_of_the_file(tmp_path, monkeypatch, name):
    """After the last line they are all counted. gzip's are those of the packed file."""
    content = b"".join(json.dumps(ROW | {"prompt": f"{i}"}).encode() + b"\n" for i in range(5000))
    content = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(content)
    bars = []

    def bar(**settings):  # it is shown after two seconds
        assert settings == {"desc": "    read", "total": len(content), "unit": "B",
                            "unit_scale": True, "delay": 2, "dynamic_ncols": True}
        bars.append(tqdm(**settings))
        return bars[-1]
    monkeypatch.setattr(preferences, "tqdm", bar)
    assert len(load_preferences(tmp_path / name)) == 5000
    assert [bar.n for bar in bars] == [len(content)]


def test_a_value_is_shown_with_at_most_60_characters():
    assert show("x" * 58) == "'" + "x" * 58 + "'"
    assert show("x" * 59) == "'" + "x" * 56 + "..."


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"prompt,chosen", "must end in"),
    ("a.jsonl", b"", "holds no pairs"),
    ("a.json", b"{}", "array"),
    ("a.json", b"{", "not JSON .* for one object a line, name it .jsonl"),
    ("a.json", b"[" * 100_000, "nested too deeply"),
    ("a.json", b'[{"prompt": "p", "chosen": "c", "rejected": "r"}, 3]', "item 2: not an object"),
    ("a.json", b'[{"chosen": "c", "chosen": "c"}, 3]', r"twice \('chosen'\), item 1\n.*item 2"),
    ("a.json", b'[\n{"prompt": "\xff"}]', "byte 0xff at position 15; save the file as UTF-8"),
    ("a.jsonl", b'\n{"prompt": "\xff"}', "line 2: not UTF-8 .byte 0xff at position 13"),
    ("a.jsonl.gz", b"not gzip", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-1], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff", "cannot be read"),
])
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_preferences(tmp_path / name)
    assert name in str(error.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match="absent.jsonl"):
        load_preferences(tmp_path / "absent.jsonl")


def test_pairs_without_a_difference_are_set_aside():
    a, b = Pair("p", "c", "r"), Pair("p", "c", "c")
    assert leave_out_equal([a, b, a]) == ([a, a], [b])


def test_split_keeps_a_prompt_on_one_side():
    prompts = [digest(f"prompt {i % 20}") for i in range(100)]
    held_out = hold_out(prompts, 0, "mine.jsonl")
    assert held_out.sum() == 10, "a tenth of the prompts is held out"
    sides = [{x for x, out in zip(prompts, held_out) if out == side} for side in (False, True)]
    assert len(sides[0]) == 18 and len(sides[1]) == 2 and not sides[0] & sides[1]
    # which prompts are held out depends on the seed, and not on the order of the pairs
    assert hold_out(prompts[::-1], 0, "")[::-1].tolist() == held_out.tolist()
    assert hold_out(prompts, 1, "").tolist() != held_out.tolist()
    assert [hold_out(prompts[:n], 0, "").sum() for n in (10, 15, 20)] == [1, 2, 2]
    with pytest.raises(DataError, match="mine.jsonl: 5 different prompts .*bring more prompts"):
        hold_out(prompts[:5], 0, "mine.jsonl")


def test_a_digest_is_eight_bytes_of_blake2b():
    """By another program: printf 'naïve' | b2sum -l 64. As a signed integer of 64 bits."""
    assert digest("naïve") == 0xbef26892eeeb4cdc - 2 ** 64


def test_no_file_ends_in_a_traceback():
    """300 files from tests/fuzz_files.py, which says what is asserted. Run by hand, it makes as
    many as one likes."""
    counts = fuzz_files.fuzz(300, seed=0, tokenizers=[TOY])
    assert 100 < counts["accepted"] < 250, "good files and broken ones both must come"


def test_the_shared_file_of_real_pairs():
    path = ROOT.parent / "shared" / "data" / "polite.jsonl"
    if not path.exists():
        pytest.skip("the real pairs that this test reads are not beside the project")
    pairs = load_preferences(path)
    usable, equal = leave_out_equal(pairs)
    assert (len(pairs), len(usable), len(equal)) == (1100, 1094, 6)
