"""lab/leak.py: what it counts is what a brute force counts, and what it changes is what it says."""
import math

import pytest
import torch

import data
import evaluate
import world
from lab import leak
from model import GPT, GPTConfig
from support.files import write_json
from tools import assert_same

TOKENIZER = data.get_tokenizer("toy")


@pytest.fixture(scope="module")
def model():
    """A GPT with random weights, whose text is not well-formed at all."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(64, TOKENIZER.n_vocab, n_layer=1, n_head=2, n_embd=32)).double().eval()
    return gpt.requires_grad_(False)


@pytest.fixture(scope="module")
def prompt():
    return TOKENIZER.encode_ordinary(world.prompts()[0][5])


def next_of_grammar():
    """The grammar of prompt 5 as next-token log-probabilities, (K,V): the mass of the responses
    that go on with a token, as a share of those that begin so. Sums over dictionaries."""
    responses, mass = leak.tokens_of(TOKENIZER)[1], {}
    p = world.grammar_logps([world.prompts()[0][5]])[0].exp().tolist()
    for response, value in zip(responses, p):
        for t in range(len(response)):
            key = tuple(response[:t]), response[t]
            mass[key] = mass.get(key, 0.0) + value
    names = leak.beginnings(TOKENIZER).names
    number = {name: i for i, name in enumerate(names)}
    out = torch.zeros(len(names), TOKENIZER.n_vocab, dtype=torch.float64)
    for (name, token), value in mass.items():
        out[number[name], token] = value
    return (out / out.sum(-1, keepdim=True)).log()


def test_the_beginnings_are_those_of_all_responses():
    responses = leak.tokens_of(TOKENIZER)[1]
    wanted = {tuple(y[:t]) for y in responses for t in range(len(y))}
    b = leak.beginnings(TOKENIZER)
    assert set(b.names) == wanted and len(b.names) == len(wanted) and b.names[0] == ()
    for i in (0, 77, 2303):
        for t in range(len(responses[i])):
            assert b.names[b.index[i, t]] == tuple(responses[i][:t])
    follow = {y[1] for y in responses if y[0] == responses[0][0]}
    row = b.may_follow[b.names.index((responses[0][0],))]
    assert set(row.nonzero()[:, 0].tolist()) == follow


def test_next_logps_are_those_of_the_model(model, prompt):
    """Their sums along a response are evaluate.exact_logps, which is float32: 1e-4."""
    b, after = leak.beginnings(TOKENIZER), leak.next_logps(model, TOKENIZER, prompt)
    logps = torch.where(b.inside, after[b.index, b.token], 0.0).sum(1)  # (N,)
    want = evaluate.exact_logps(model, [world.prompts()[0][5]])[0]
    assert_same(logps, want, 1e-4, {
        "each token is one place too late": want.roll(1)}, what="log pi(y|x)")


def test_the_grammar_leaks_nowhere_and_a_random_model_everywhere(model, prompt):
    """The grammar comes to "very" with the probability that the words say, counted here, and loses
    nothing. What a model loses, and what it writes, is everything: 1e-9."""
    found = leak.exits(next_of_grammar(), TOKENIZER)
    very = world.MODIFIERS[" very"]
    assert found["very"][0] == pytest.approx(2 * very, abs=1e-9)  # once in each half
    assert found["not"][0] == pytest.approx(
        2 * (world.MODIFIERS[" not"] + world.MODIFIERS[" not very"]), abs=1e-9)
    assert sum(leaves for _, leaves in found.values()) == pytest.approx(0, abs=1e-9)
    found = leak.exits(leak.next_logps(model, TOKENIZER, prompt), TOKENIZER)
    written = evaluate.exact_logps(model, [world.prompts()[0][5]])[0].exp().sum().item()
    assert sum(leaves for _, leaves in found.values()) + written == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("text, place", [
    ("", "a half begins"), (" very", "very"), (" not very superb", "not very ..."),
    (" superb and", "a half begins"), (" superb, but not", "not"), (" superb,", "...,"),
    (" superb and not dark. I", "not .... I")])
def test_places_by_hand(text, place):
    assert leak.place_of(text) == place


def test_a_table_begins_as_the_reference():
    """Without shared logits it is the grammar, to 1e-9. With both halves apart it is the grammar,
    too, because the grammar's second half forgets the first. Where "very" shares its logits with
    "not very" it still is: they go on with the same adjectives."""
    grammar = next_of_grammar()
    want = world.grammar_logps([world.prompts()[0][5]])[0]
    rows = {}
    for name, key in leak.keys(TOKENIZER).items():
        table = leak.Table(grammar, TOKENIZER, key)
        assert_same(table(torch.arange(2304)), want, 1e-9, what=f"the table {name}")
        rows[name] = len(table.logits)
    assert rows["no logits"] > rows["very and not very"] > rows["the two halves"] > rows["both"]


def test_tables_share_what_they_say():
    keys = leak.keys(TOKENIZER)

    def same(name, a, b):
        a, b = [tuple(TOKENIZER.encode_ordinary(text)) for text in (a, b)]
        return keys[name](a) == keys[name](b)

    for name, halves, alike in (("no logits", False, False), ("the two halves", True, False),
                                ("very and not very", False, True), ("both", True, True)):
        assert same(name, " superb and not", " dull and not") == halves
        assert same(name, " superb, but not very dark", " dull, but not very dark") == halves
        assert same(name, " superb and very", " superb and not very") == alike
        assert not same(name, " superb and not", " superb, but not")
        assert not same(name, " very superb", " not very superb")


def test_places_of_an_untied_transformer_by_hand():
    """What is named, of the beginnings of one text, and how many names there are: none and three
    modifiers, in the first half, after "and", after "but", and the comma before "but"."""
    found = leak.own_places(TOKENIZER)
    text = " not very superb, but not very dark. I loved it."
    beginnings = [text[:end] for end in (0, 4, 9, 16, 17, 21, 25, 30, 35)]
    tokens = [tuple(TOKENIZER.encode_ordinary(beginning)) for beginning in beginnings]
    place, names = found["not very"]
    assert [place(y) for y in tokens] == [None, None, "not very", None, None, None, None,
                                          "not very", None]
    place, names = found["each modifier"]
    words = [TOKENIZER.decode(list(place(y))) if place(y) is not None else None for y in tokens]
    assert words == ["", " not", " not very", None, ",", ", but", ", but not", ", but not very",
                     None]
    assert len(names) == len(set(names)) == 3 * 4 + 1 and None not in names


@pytest.mark.parametrize("name", leak.PARTS)
def test_an_untied_transformer_changes_only_where_it_says(model, prompt, name):
    """It begins as the model, to 1e-12, with copies of every part. A copy whose one part has
    changed changes the logits behind "not very", and nowhere else; so does the gradient."""
    place, names = leak.own_places(TOKENIZER)["not very"]
    untied = leak.Untied(model, len(prompt), place, names, list(leak.PARTS))
    tokens, _ = data.pad([prompt] * 8, leak.tokens_of(TOKENIZER)[1][::300])
    assert_same(untied.head(untied.hidden(tokens)), model(tokens), 1e-12, what="the logits")
    very, no = [TOKENIZER.encode_ordinary(word)[0] for word in (" very", " not")]
    here = torch.zeros_like(tokens, dtype=torch.bool)
    here[:, 1:] = (tokens[:, 1:] == very) & (tokens[:, :-1] == no)
    assert here.any() and not here.all()
    block = untied.copies[0].h[0]
    weight = {"attention": block.attn.c_proj, "MLP": block.mlp.c_proj,
              "head": untied.copies[0].head}[name].weight
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    changed = (untied.hidden(tokens) - model(tokens)).abs().amax(-1) > 1e-6  # (B, T)
    assert (changed == here).all(), "the copy's place is where \"not very\" has just been written"
    shared = leak.Untied(model, len(prompt), place, names, [n for n in leak.PARTS if n != name])
    assert_same(shared.hidden(tokens), model(tokens), 1e-12, what="the logits of other parts")
    untied.requires_grad_(True)
    untied.hidden(tokens)[~here].sum().backward()
    assert weight.grad is None or not weight.grad.any()


def test_an_untied_transformer_has_one_layer():
    gpt = GPT(GPTConfig(64, TOKENIZER.n_vocab, n_layer=2, n_head=2, n_embd=32))
    with pytest.raises(ValueError, match="2 layers"):
        leak.Untied(gpt, 5, lambda y: None, [], ["MLP"])


def test_pairs_and_their_exact_labels():
    """Two different responses to the prompts that were named, in turn. The probability is Eq. 1 of
    the true rewards, computed here for each: 1e-6."""
    prompt, first, second, p = leak.draw_pairs(40, [3, 7], seed=1)
    assert prompt.tolist() == [3, 7] * 20 and (first != second).all()
    texts, names = world.responses(), world.prompts()[0]
    for x, a, b, got in zip(prompt.tolist(), first.tolist(), second.tolist(), p.tolist()):
        margin = (world.true_reward(names[x], texts[a]) - world.true_reward(names[x], texts[b]))
        assert got == pytest.approx(1 / (1 + math.exp(-margin)), abs=1e-6)
    assert 0.2 < p.mean() < 0.8


def test_what_is_gathered_and_printed(tmp_path, monkeypatch):
    """Two runs, one piece. The three places where most mass leaves are those of the first run."""
    monkeypatch.setattr(leak, "pieces", lambda: [leak.work.Piece("leak/plain", None)])
    ref = {place: [0.1, 0.0] for place in "abcd"}
    policy = {"a": [0.2, 0.01], "b": [0.3, 0.2], "c": [0.4, 0.0], "d": [0.5, 0.1]}
    for name, wellformed in (("one", 0.5), ("two", 0.75)):
        write_json({"wellformed": wellformed, "share_of_j": 0.9, "exits": [ref, policy]},
                   tmp_path / name / "leak" / "plain" / "result.json")
    found = leak.gather([tmp_path / "one", tmp_path / "two"])
    assert found == {"plain": {
        "wellformed": [0.5, 0.75], "share_of_j": [0.9, 0.9],
        "exits": {"b": [0.1, 0.3, 0.2], "d": [0.1, 0.5, 0.1], "a": [0.1, 0.2, 0.01]}}}
    printed = leak.table_of(found)
    assert " 50.0  75.0" in printed and "after 'b' 20.0%, 'd' 10.0%, 'a' 1.0%" in printed
