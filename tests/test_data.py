"""data.py and users' files: tokens, masks, batches, the toy data, and files of pairs."""
import gzip
import json
import os
import re

import pytest
import torch

import data
import world
from conftest import ROOT
from data import DataError, Example, Pair, collate, load_preferences
from support.preferences import leave_out_equal, save_preferences, split, split_by_prompt

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
    ones, all padded to the longest row of the batch."""
    examples = [Example([1, 2, 3], [4, 5], [6]), Example([7, 8], [9, 10], [11, 12, 13])]
    batch = collate(examples, pad_id=0)
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
    short, long = Pair("a", "b", "c"), Pair("a", "b", "c" * 30)
    examples, too_long = data.tokenize([short, long], TOY, max_length=10)
    assert len(examples) == 1 and too_long == [long]


def padding_factor(batches, lengths):
    """Positions in the padded batches, for each real token."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return padded / sum(lengths)


def test_batches_hold_every_index_once_and_repeat_with_the_seed():
    lengths = torch.randint(5, 300, (1003,)).tolist()
    batches = data.batches(lengths, 16, seed=3)
    assert sorted(sum(batches, [])) == list(range(1003))
    assert batches == data.batches(lengths, 16, seed=3) != data.batches(lengths, 16, seed=4)
    in_order = [list(range(i, min(i + 16, 1003))) for i in range(0, 1003, 16)]
    assert padding_factor(batches, lengths) < 1.2 < padding_factor(in_order, lengths), \
        "grouping by length saves most of the padding"


def test_toy_batches_mix_lengths():
    """Batches of one length each would make the gradient swing with the length. The toy texts
    have 14 to 20 tokens and must be drawn together."""
    examples, _ = data.tokenize(data.make_preferences(3200), TOY)
    first = data.batches([len(e) for e in examples], 64, seed=0)[0]
    assert len({len(examples[i]) for i in first}) > 2


def test_a_plan_holds_every_index_once_an_epoch_in_another_order():
    """data.epochs is data.batches three times, each time with another seed."""
    lengths = torch.randint(5, 300, (103,)).tolist()
    plan = data.epochs(lengths, 16, seed=3, n=3)
    a_third = len(plan) // 3
    parts = [plan[:a_third], plan[a_third:2 * a_third], plan[2 * a_third:]]
    for part in parts:
        assert sorted(sum(part, [])) == list(range(103))
    assert parts[0] != parts[1] != parts[2] != parts[0]
    assert plan == data.epochs(lengths, 16, seed=3, n=3) != data.epochs(lengths, 16, seed=4, n=3)
    assert data.epochs(lengths, 16, seed=3, n=0) == []


# ---- The toy data

def test_preferences_are_fixed_by_their_seed_and_never_touch_a_held_out_prompt():
    pairs = data.make_preferences(2000, seed=5)
    assert pairs == data.make_preferences(2000, seed=5) != data.make_preferences(2000, seed=6)
    held_out = set(world.prompts()[1])
    assert not any(p.prompt in held_out for p in pairs)
    assert all(p.chosen != p.rejected for p in pairs)
    assert all(world.parse(p.chosen) and world.parse(p.rejected) for p in pairs)
    assert not any(prompt in held_out for prompt, _ in data.make_sft_corpus(500, seed=0))


def test_annotators_compare_the_same_texts():
    human = data.make_preferences(500, "human", seed=1)
    ai = data.make_preferences(500, "ai", seed=1)
    assert [{p.chosen, p.rejected} for p in human] == [{p.chosen, p.rejected} for p in ai]
    assert human != ai


def test_responses_are_drawn_from_the_grammar():
    """48,000 draws: the share of each word is within 5 standard errors of the grammar's
    probability."""
    corpus = data.make_sft_corpus(48000, seed=0)
    prompt = world.prompts()[0][0]
    drawn = [y for x, y in corpus if x == prompt]
    probabilities = world.grammar_logps([prompt])[0].exp().tolist()
    for word in list(world.VALENCE) + ["loved", " not", " very", "but"]:
        p = sum(q for q, y in zip(probabilities, world.responses()) if word in y)
        share = sum(word in y for y in drawn) / len(drawn)
        assert abs(share - p) < 5 * (p * (1 - p) / len(drawn)) ** 0.5, word


def test_written_pairs_read_back_and_nothing_is_overwritten(tmp_path):
    pairs = data.make_preferences(20)
    save_preferences(pairs, tmp_path / "p.jsonl")
    assert load_preferences(tmp_path / "p.jsonl") == pairs
    with pytest.raises(FileExistsError):
        save_preferences(pairs, tmp_path / "p.jsonl")


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
    # a file that begins with a byte order mark and ends its lines as Windows does
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n")
    assert load_preferences(tmp_path / "bom.jsonl") == expected[:1]


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    row = {"prompt": "a\u2028b\x85c", "chosen": "c", "rejected": "r"}
    file = write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))
    assert load_preferences(file)[0].prompt == row["prompt"]


@pytest.mark.parametrize("row, expected", [
    # Anthropic HH: the answers share "I think", which is no part of the prompt
    ({"chosen": HH + "so.", "rejected": HH + "not."},
     (HH[:-len(" I think ")], " I think so.", " I think not.")),
    # any other text: the common prefix, back to a whole word
    ({"chosen": "the cat sat", "rejected": "the car sat"}, ("the", " cat sat", " car sat")),
    # messages: with the prompt apart, inside both answers, and as a text beside them
    ({"prompt": [user("Hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
     (HI, " yes", " no")),
    ({"chosen": [user("Hi"), assistant("yes")], "rejected": [user("Hi"), assistant("no")]},
     (HI, " yes", " no")),
    ({"prompt": "Hi", "chosen": [user("Hi"), assistant("yes")],
      "rejected": [user("Hi"), assistant("no")]},
     (HI, " yes", " no")),
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
    (ROW | {"chosen": None}, "chosen is None"),
    (ROW | {"prompt": 3}, "prompt is 3"),
    (ROW | {"prompt": None}, "prompt is None"),
    (ROW | {"rejected": "  "}, "rejected is empty"),
    (ROW | {"prompt": ""}, "prompt is empty"),
    (ROW | {"chosen": "\ud83d"}, "surrogate"),
    ({"chosen": "abc", "rejected": "xyz"}, "do not begin alike"),
    (ROW | {"chosen": [assistant("c")]}, "chosen is"),
    ({"chosen": [{"role": "bot", "content": "x"}], "rejected": [assistant("r")]}, "message"),
    ({"prompt": "Bye", "chosen": [user("Hi"), assistant("y")],
      "rejected": [user("Hi"), assistant("n")]}, "prompt 'Bye'"),
    ({"chosen": [assistant("y")], "rejected": [assistant("n")]}, "no prompt message"),
    ({"prompt": [user("Hi")], "chosen": [assistant("y"), user("and?")],
      "rejected": [assistant("n")]}, "exactly one assistant message"),
])
def test_a_bad_row_is_named_with_file_line_and_value(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", ROW, "", row)
    with pytest.raises(DataError, match=message) as error:
        load_preferences(path)
    assert "bad.jsonl, line 3" in str(error.value), "blank lines count as lines"


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"prompt,chosen", "must end in"),
    ("a.jsonl", b"", "holds no pairs"),
    ("a.json", b"{}", "array"),
    ("a.jsonl", b'{"prompt": "\xff"}', "0xff"),
    ("a.jsonl.gz", b"not gzip", "cannot be read"),
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
    pairs = [Pair(f"prompt {i % 20}", f"c{i}", "r") for i in range(100)]
    train, held_out = split_by_prompt(pairs, 0.1, seed=0)
    assert len(train) == 90 and len(held_out) == 10
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    # which prompts are held out does not depend on the order of the pairs
    train_2, held_out_2 = split_by_prompt(pairs[::-1], 0.1, seed=0)
    assert (train_2[::-1], held_out_2[::-1]) == (train, held_out)
    with pytest.raises(DataError, match="bring more prompts"):
        split_by_prompt(pairs[:1], 0.1, seed=0)


def test_split_leaves_out_pairs_without_a_difference():
    """What train.py does with a user's pairs: equal ones are left out first, then a tenth of the
    prompts is held out."""
    pairs = [Pair(f"prompt {i}", "c", "r") for i in range(20)]
    equal = Pair("prompt 0", "c", "c")
    assert split(pairs + [equal], seed=4) == (*split_by_prompt(pairs, 0.1, seed=4), [equal])


def test_the_shared_file_of_real_pairs():
    path = ROOT.parent / "shared" / "data" / "polite.jsonl"
    if not path.exists():
        pytest.skip("the real pairs that this test reads are not beside the project")
    pairs = load_preferences(path)
    usable, equal = leave_out_equal(pairs)
    assert (len(pairs), len(usable), len(equal)) == (1100, 1094, 6)
