"""model.py: the transformer against one written without it, the cache, and generation."""
import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo import response_logps
from model import GPT, GPTConfig, sample, sequence_logps
from support.machine import recompute
from support.prefixes import distinct_prefixes

CONFIG = GPTConfig(block_size=24, vocab_size=40, n_layer=2, n_head=2, n_embd=16)


# ---- The oracle: a second GPT-2, token by token and head by head, from a state dict alone

def layer_norm(w, name, x):
    normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    return normed * w[name + ".weight"] + w[name + ".bias"]


def linear(w, name, x):
    return w[name + ".weight"] @ x + w[name + ".bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def head_output(qkv, t, part):
    """One head's answer at position t: the values before it, weighted by softmax(q k / sqrt(d)).

    qkv: a (query, key, value) for each position. part: the channels of this head.
    """
    query = qkv[t][0][part]
    size = len(query)
    scores = [query @ qkv[j][1][part] / math.sqrt(size) for j in range(t + 1)]
    weights = torch.stack(scores).softmax(0)
    return sum(p * qkv[j][2][part] for j, p in enumerate(weights))


def plain_gpt(state, config, tokens):
    """The logits of every position, (T,V), in float64. tokens: a list of token ids."""
    w = {name: value.double() for name, value in state.items()}
    size = config.n_embd // config.n_head
    xs = [w["wte.weight"][token] + w["wpe.weight"][i] for i, token in enumerate(tokens)]
    for layer in range(config.n_layer):
        name = f"h.{layer}."
        qkv = []
        for x in xs:
            qkv.append(linear(w, name + "attn.c_attn", layer_norm(w, name + "ln_1", x)).chunk(3))
        for t in range(len(xs)):
            heads = []
            for h in range(config.n_head):
                heads.append(head_output(qkv, t, slice(h * size, (h + 1) * size)))
            xs[t] = xs[t] + linear(w, name + "attn.c_proj", torch.cat(heads))
            inner = gelu(linear(w, name + "mlp.c_fc", layer_norm(w, name + "ln_2", xs[t])))
            xs[t] = xs[t] + linear(w, name + "mlp.c_proj", inner)
    return torch.stack([w["wte.weight"] @ layer_norm(w, "ln_f", x) for x in xs])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


# ---- Forward

def test_forward_is_the_transformer_written_out(model):
    """All positions against the oracle above, in float64; tolerance 1e-10."""
    model.double()
    tokens = torch.randint(40, (9,))
    logits = model(tokens[None])
    assert logits.shape == (1, 9, 40)
    oracle = plain_gpt(model.state_dict(), CONFIG, tokens.tolist())
    assert (logits[0] - oracle).abs().max() < 1e-10


def test_causal(model):
    tokens = torch.randint(40, (2, 9))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 40
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :6], b[:, :6]), "a position sees tokens after it"
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_hidden_states_then_head_is_forward(model):
    tokens = torch.randint(40, (3, 7))
    assert torch.equal(model.head(model.hidden(tokens)), model(tokens))
    assert model.head.weight is model.wte.weight, "the head is tied to the token embedding"


def test_states_that_are_computed_again_are_the_same_and_take_less_memory():
    """With machine.recompute, in training with dropout: logits and gradients to the bit. What the
    backward pass keeps beside the weights is counted, each storage once. It is less than a quarter.
    That holds for a copy of the model too, which uses its own weights, and if it is said twice."""
    gpt = GPT(GPTConfig(24, 9, n_layer=4, n_head=2, n_embd=16, dropout=0.25))
    tokens, results, kept = torch.randint(9, (3, 20)), [], []
    for times in range(3):
        recompute(gpt, times > 0)
        model, storages = copy.deepcopy(gpt), {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits = model(tokens)
        weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
        kept.append(sum(storages.values()) - weights)
        results.append([logits, *torch.autograd.grad(logits.sin().sum(), model.parameters())])
    for values in zip(*results, strict=True):
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert kept[1] == kept[2] < kept[0] / 4, f"{kept} bytes are kept"


# ---- What several rows begin with is computed once

rows_and_needed = st.integers(1, 6).flatmap(lambda t: st.lists(
    st.tuples(*[st.lists(kind, min_size=t, max_size=t) for kind in (st.integers(0, 2),
                                                                    st.booleans())]),
    min_size=1, max_size=7))


@given(rows_and_needed)
def test_each_beginning_is_found_once(both):
    """The oracle is a set of tuples. For any rows of three kinds of token, so that many begin
    alike, and any needed places: the beginnings found are those up to a needed place, each once,
    and the tables lead from a needed place to its own beginning. Exact."""
    idx, needed = [torch.tensor(part) for part in zip(*both)]
    tokens, pos, state, place = distinct_prefixes(idx, needed)
    spelled = []  # the beginning that each state stands for, spelled by the table
    for n in range(len(tokens)):
        b, t = divmod(place[n].item(), idx.size(1))
        assert t == pos[n], "a state stands at another position than the table says"
        assert state[b, t] == n, "the place of a state holds another state"
        spelled.append(tuple(tokens[state[b, :t + 1]].tolist()))
    wanted = {(ids[0],) for ids in idx.tolist()}  # the first token is always computed
    for b, t in needed.nonzero().tolist():
        beginning = tuple(idx[b, :t + 1].tolist())
        assert spelled[state[b, t]] == beginning, "a place has the state of another beginning"
        wanted |= {beginning[:i + 1] for i in range(t)} | {beginning}
    assert len(set(spelled)) == len(spelled), "a beginning is computed twice"
    assert set(spelled) == wanted, "a beginning is missing, or padding is computed"


@given(rows_and_needed, st.integers(0, 99))
def test_beginnings_computed_once_change_no_state_and_no_gradient(both, seed):
    """Against `hidden` of every row and every place, in float64: states where they are needed, and
    the gradients of a random function of them; tolerance 1e-12."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=6, vocab_size=3, n_layer=2, n_head=2, n_embd=8)).double()
    idx, needed = [torch.tensor(part) for part in zip(*both)]
    weights = torch.randn(*idx.shape, 8).double() * needed[..., None]
    results = []
    for states in (model.hidden(idx, needed=needed), model.hidden(idx)):
        gradients = torch.autograd.grad((states * weights).sum(), model.h.parameters())
        results.append([states[needed], *gradients])
    for got, want in zip(*results):
        assert torch.allclose(got, want, rtol=0, atol=1e-12), (got - want).abs().max()


def test_a_pair_costs_its_prompt_once(model):
    """Two pairs. The second one's prompt is what the first one's begins with. The responses of the
    first begin with the same token. The last token of a response predicts nothing. So the model
    runs on 3 + 1 + 2 + 2 tokens of the first pair, on 3 + 1 of the second, and on no padding."""
    seen = []
    model.h[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    texts = [([1, 2, 3], [4, 5, 6, 0]), ([1, 2], [7, 8, 9, 0]),
             ([1, 2, 3], [4, 7, 7, 0]), ([1, 2], [9, 0])]
    tokens = torch.tensor([x + y + [0] * (7 - len(x + y)) for x, y in texts])
    position = torch.arange(7)
    mask = torch.stack([(position >= len(x)) & (position < len(x + y)) for x, y in texts])
    logps = sequence_logps(model, tokens, mask)
    assert seen == [(12, 16)], f"the MLP saw {seen}; wanted 12 states of 16 numbers"
    assert torch.allclose(logps, response_logps(model(tokens), tokens, mask), rtol=0, atol=1e-5)


def test_cache_gives_the_same_logits_in_any_pieces(model, monkeypatch):
    """Tolerance 1e-5: both are float32. PyTorch takes no mask where is_causal is set, and its
    fastest kernels take none at all. So there is a mask only where it is needed: where several new
    tokens follow a past."""
    attention, masked = torch.nn.functional.scaled_dot_product_attention, []

    def keep_mask(q, k, v, attn_mask, **kwargs):
        masked.append(attn_mask is not None)
        return attention(q, k, v, attn_mask, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", keep_mask)
    tokens = torch.randint(40, (2, 12))
    whole = model(tokens)
    for pieces in ([12], [1] * 12, [2] * 6, [5, 1, 6], [3, 4, 5]):
        cache = model.new_cache()
        masked.clear()
        parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5, f"read in pieces of {pieces}"
        needed = [i > 0 and size > 1 for i, size in enumerate(pieces)]
        assert masked[::2] == masked[1::2] == needed, f"masks, read in pieces of {pieces}"


def test_attention_weights_are_dropped_in_training_alone():
    """A token that stands alone gives its whole attention to itself. With dropout 1/4 a head's
    answer is 0 with probability 1/4, and 4/3 of the value otherwise: 4,000 heads, 5 standard
    errors. Without training it is the value."""
    attention = GPT(GPTConfig(8, 9, n_layer=1, n_head=2, n_embd=4, dropout=0.25)).h[0].attn
    attention.c_proj, attention.resid_dropout = torch.nn.Identity(), torch.nn.Identity()
    x = torch.randn(2000, 1, 4)
    value = attention.c_attn(x)[..., 8:]  # (2000, 1, 4)
    assert torch.equal(attention.eval()(x)[0], value)
    kept = attention.train()(x)[0] / value  # (2000, 1, 4)
    assert torch.equal(kept[..., ::2] == 0, kept[..., 1::2] == 0), "a head is dropped as a whole"
    assert torch.allclose(kept[kept != 0], torch.tensor(4 / 3))
    assert abs((kept == 0).double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_padding_changes_nothing(model):
    """The log-probabilities of texts, padded and alone: 1e-5 in float32, whatever the pad id."""
    texts = [torch.randint(40, (n,)).tolist() for n in (4, 9, 6)]
    position = torch.arange(12)
    lengths = torch.tensor([len(t) for t in texts])
    mask = (position >= 2) & (position < lengths[:, None])
    for pad_id in (0, 39):
        tokens = torch.tensor([t + [pad_id] * (12 - len(t)) for t in texts])
        together = response_logps(model(tokens), tokens, mask)
        for text, logp in zip(texts, together):
            alone = torch.tensor([text])
            alone_mask = position[None, :len(text)] >= 2
            alone_logp = response_logps(model(alone), alone, alone_mask)
            assert abs(alone_logp.item() - logp.item()) < 1e-5


# ---- Generation

def test_greedy_generation_with_cache_without_and_by_hand(model):
    """Prompts of different lengths: all together, each alone, and the likeliest token of a full
    forward without a cache, token for token. The longest text fills the model's block."""
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [35]]
    for prompt, response in zip(prompts, model.generate(prompts, 10, temperature=0)):
        assert response == model.generate([prompt], 10, temperature=0)[0]
        tokens = list(prompt)
        for _ in range(10):
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        assert response == tokens[len(prompt):]


def test_generation_stops_after_eos_and_keeps_it(model, monkeypatch):
    """200 tables of 3 texts say which token is drawn where. The tokens are 0 to 3, and 0 is EOS,
    in prompts too. A response is its row after the prompt, up to the first EOS. What is read is
    counted: the shortest prompt's length once, then a token a text, until the last response ends.
    Of three texts, one that has ended is more than a quarter. So it is read no more.
    """
    read, sizes = [], []

    def hidden(idx, cache):
        read.append(idx.size(1))
        sizes.append(len(cache[0][0]))
        assert len(idx) == sizes[-1], "the cache has other rows than the texts that go on"
        return cache[0][0][:, None, None].expand(*idx.shape, 16)  # which row it is
    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model.head, "forward", lambda states: states[:, 0].long())
    rows_of_cache = torch.arange(3.0)
    monkeypatch.setattr(model, "new_cache", lambda: [(rows_of_cache, rows_of_cache)])
    for k in range(200):
        table, lengths = torch.randint(4, (3, 11)), torch.randint(1, 6, (3,)).tolist()
        rows = table.tolist()
        eos, start = (None, 0)[k % 2], min(lengths)
        read.clear()
        sizes.clear()
        monkeypatch.setattr("model.sample", lambda which, *_: table[which, start + len(read) - 1])
        got = model.generate([row[:n] for row, n in zip(rows, lengths)], 6, eos_id=eos)
        want = [row[n:n + 6] for row, n in zip(rows, lengths)]
        if eos is not None:
            want = [y[:y.index(0) + 1] if 0 in y else y for y in want]
        assert got == want, "a response keeps its first EOS, and ends with it"
        last = max(n + len(y) for n, y in zip(lengths, want))
        assert read == [start] + [1] * (last - start - 1), "more is read than is needed"
        ends = [n + len(y) for n, y in zip(lengths, want)]
        going_on = [sum(t < end for end in ends) for t in range(start, last)]
        assert sizes == going_on, "a text that has ended is still read"


def test_samples_follow_the_model(model):
    """20,000 samples of one next token: every frequency is within 5 standard errors of the
    softmax."""
    prompt = [3, 1, 4]
    for temperature, chosen in ((1.0, {}), (0.5, {"temperature": 0.5})):  # 1 is the default
        p = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
        samples = model.generate([prompt] * 20000, 1, **chosen)
        share = torch.bincount(torch.tensor(samples).flatten(), minlength=40) / 20000
        assert ((share - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt() + 1e-9).all()


def test_top_k_samples_among_the_k_likeliest():
    """The k likeliest keep their odds, e : 1 here for k = 2: 5 standard errors of 2,000 samples.
    A k above the vocabulary's size excludes nothing."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(2000, -1)
    drawn, p = sample(logits, top_k=2), math.e / (math.e + 1)
    assert set(drawn.tolist()) == {1, 3}
    assert abs((drawn == 1).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / 2000)
    assert set(sample(logits, top_k=1).tolist()) == {1}
    assert set(sample(logits, top_k=5).tolist()) == {0, 1, 2, 3}


def test_generate_leaves_the_mode_and_ignores_dropout():
    config = GPTConfig(block_size=24, vocab_size=40, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    model = GPT(config).train()
    once = model.generate([[1, 2]], 8, temperature=0)
    again = model.generate([[1, 2]], 8, temperature=0)
    assert once == again and model.training


@pytest.mark.parametrize("call, message", [
    (lambda m: m(torch.zeros(1, 25, dtype=torch.long)), "block_size=24"),
    (lambda m: m.generate([[1] * 20], 5), "block_size=24"),
    (lambda m: m.generate([], 5), "at least one prompt, and a token in each"),
    (lambda m: m.generate([[1], []], 5), "at least one prompt, and a token in each"),
    (lambda m: m.generate([[1]], 5, temperature=-1), "temperature=-1"),
    (lambda m: GPTConfig(24, 40, n_layer=2, n_head=4, n_embd=10), "n_embd=10"),
])
def test_impossible_requests_say_why(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_residual_projections_start_smaller(monkeypatch):
    """GPT-2's initialisation: normal, with standard deviation s = 0.02 at its width of 768 and
    twice as much at 192, and s/sqrt(2 n_layer) in the projections into the residual stream. The
    standard deviation itself stands in the place of what is drawn (1e-6 of it, float32)."""
    def fill(p, mean=0.0, std=1.0):
        p.data.fill_(std)
    monkeypatch.setattr(torch.nn.init, "normal_", fill)
    for n_embd, s in ((768, 0.02), (192, 0.04)):
        model = GPT(GPTConfig(block_size=2, vocab_size=3, n_layer=2, n_head=4, n_embd=n_embd))
        for name, p in model.named_parameters():
            want = 0.0 if name.endswith("bias") else s
            if name.endswith("c_proj.weight"):
                want = s / 2
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                want = 1.0
            assert torch.allclose(p, torch.tensor(want), rtol=1e-6, atol=0), name
