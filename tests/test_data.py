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

import data
import world
from conftest import ROOT
from data import DataError, Example, Pair, collate, load_preferences
from support.preferences import leave_out_equal, save_preferences, show, split, split_by_prompt

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
    ({"chosen": "the cart", "rejected": "the care"}, ("the", " cart", " care")),
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
    ({"prompt": "p"}, "no 'chosen'"),
    (ROW | {"chosen": None}, "chosen is None"),
    (ROW | {"prompt": 3}, "prompt is 3"),
    (ROW | {"prompt": None}, "prompt is None"),
    (ROW | {"rejected": "  "}, "rejected is empty"),
    ({"prompt": "", "chosen": "", "rejected": "r"}, "prompt is empty"),
    (ROW | {"chosen": "c\ud800"}, "chosen holds half of a surrogate"),
    (ROW | {"rejected": "\udfffr"}, "rejected holds half of a surrogate"),
    ({"chosen": "abc", "rejected": "xyz"}, "do not begin alike"),
    (ROW | {"chosen": [assistant("c")]}, "chosen is"),
    ({"chosen": [{"role": "bot", "content": "x"}], "rejected": ["r"]}, "message {'role': 'bot'"),
    ({"chosen": [assistant("c")], "rejected": ["r"]}, "message 'r'"),
    ({"chosen": [assistant(3)], "rejected": [assistant("r")]}, "message .*'content': 3"),
    ({"prompt": [user(4)], "chosen": [assistant("c")], "rejected": [assistant("r")]},
     "message .*'content': 4"),
    ({"prompt": "Bye", "chosen": [user("Hi"), assistant("y")],
      "rejected": [user("Hi"), assistant("n")]}, "prompt 'Bye'"),
    ({"prompt": "y", "chosen": [assistant("y")], "rejected": [assistant("n")]}, "prompt 'y'"),
    ({"chosen": [assistant("y")], "rejected": [assistant("n")]}, "no prompt message"),
    ({"prompt": [user("Hi")], "chosen": [assistant("y"), user("and?")],
      "rejected": [assistant("n"), user("and?")]}, "chosen must end in exactly one assistant"),
    ({"chosen": [user("Hi"), assistant("y")],
      "rejected": [user("Hi"), assistant("y"), user("and?")]},
     "rejected must end in exactly one assistant"),
])
def test_a_bad_row_is_named_with_file_line_and_value(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", ROW, "", row)
    with pytest.raises(DataError, match=message) as error:
        load_preferences(path)
    assert "bad.jsonl, line 3" in str(error.value), "blank lines count as lines"


def test_a_value_is_shown_with_at_most_60_characters():
    assert show("x" * 58) == "'" + "x" * 58 + "'"
    assert show("x" * 59) == "'" + "x" * 56 + "..."


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"prompt,chosen", "must end in"),
    ("a.jsonl", b"", "holds no pairs"),
    ("a.json", b"{}", "array"),
    ("a.json", b'[{"prompt": "p", "chosen": "c", "rejected": "r"}, 3]', "item 2: 3 is not"),
    ("a.jsonl", b'{"prompt": "\xff"}', "0xff"),
    ("a.jsonl.gz", b"not gzip", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"{}")[:-1], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"{}")[:10] + b"\xff", "cannot be read"),
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
    train, held_out = split_by_prompt(pairs, seed=0)
    assert len(train) == 90 and len(held_out) == 10, "a tenth of the prompts is held out"
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    # which prompts are held out does not depend on the order of the pairs
    train_2, held_out_2 = split_by_prompt(pairs[::-1], seed=0)
    assert (train_2[::-1], held_out_2[::-1]) == (train, held_out)
    assert [len(split_by_prompt(pairs[:n], seed=0)[1]) for n in (10, 15, 20)] == [1, 2, 2]
    with pytest.raises(DataError, match="bring more prompts"):
        split_by_prompt(pairs[:5], seed=0)


def test_split_leaves_out_pairs_without_a_difference():
    """What train.py does with a user's pairs: equal ones are left out first, then a tenth of the
    prompts is held out."""
    pairs = [Pair(f"prompt {i}", "c", "r") for i in range(20)]
    equal = Pair("prompt 0", "c", "c")
    assert split(pairs + [equal], seed=4) == (*split_by_prompt(pairs, seed=4), [equal])


def test_the_shared_file_of_real_pairs():
    path = ROOT.parent / "shared" / "data" / "polite.jsonl"
    if not path.exists():
        pytest.skip("the real pairs that this test reads are not beside the project")
    pairs = load_preferences(path)
    usable, equal = leave_out_equal(pairs)
    assert (len(pairs), len(usable), len(equal)) == (1100, 1094, 6)
