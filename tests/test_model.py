"""model.py and its files: the transformer against one written without it, the cache, generation,
checkpoints and GPT-2's weights."""
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from dpo import response_logps
from model import GPT, GPTConfig, sample
from support.checkpoints import fingerprint, load_model, save_model

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


def test_cache_gives_the_same_logits_in_any_pieces(model):
    tokens = torch.randint(40, (2, 12))
    whole = model(tokens)
    for pieces in ([12], [1] * 12, [5, 1, 6], [3, 4, 5]):
        cache = model.new_cache()
        parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5, f"read in pieces of {pieces}"


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
    """Prompts of different lengths: with the cache, without it, each prompt alone, and the
    likeliest token of a full forward, token for token."""
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [35]]
    cached = model.generate(prompts, 10, temperature=0)
    assert cached == model.generate(prompts, 10, temperature=0, use_cache=False)
    for prompt, response in zip(prompts, cached):
        assert response == model.generate([prompt], 10, temperature=0)[0]
        tokens = list(prompt)
        for _ in range(10):
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        assert response == tokens[len(prompt):]


def test_generation_stops_after_eos_and_keeps_it(model):
    prompts = [[7, 8], [9, 10, 11]]
    free = model.generate(prompts, 12, temperature=0)
    eos = free[0][3]
    stopped = model.generate(prompts, 12, temperature=0, eos_id=eos)
    for full, cut in zip(free, stopped):
        assert cut == (full[:full.index(eos) + 1] if eos in full else full)


def test_samples_follow_the_model(model):
    """20,000 samples of one next token: every frequency is within 5 standard errors of the
    softmax."""
    prompt = [3, 1, 4]
    for temperature in (1.0, 0.5):
        p = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
        samples = model.generate([prompt] * 20000, 1, temperature=temperature)
        share = torch.bincount(torch.tensor(samples).flatten(), minlength=40) / 20000
        assert ((share - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt() + 1e-9).all()


def test_top_k_samples_among_the_k_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(2000, -1)
    assert set(sample(logits, top_k=2).tolist()) == {1, 3}
    assert set(sample(logits, top_k=1).tolist()) == {1}


def test_generate_leaves_the_mode_and_ignores_dropout():
    config = GPTConfig(block_size=24, vocab_size=40, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    model = GPT(config).train()
    once = model.generate([[1, 2]], 8, temperature=0)
    again = model.generate([[1, 2]], 8, temperature=0)
    assert once == again and model.training


@pytest.mark.parametrize("call, message", [
    (lambda m: m(torch.zeros(1, 25, dtype=torch.long)), "block_size=24"),
    (lambda m: m.generate([[1] * 20], 5), "block_size=24"),
    (lambda m: m.generate([[]], 5), "at least one prompt, and a token in each"),
    (lambda m: m.generate([[1]], 5, temperature=-1), "temperature=-1"),
    (lambda m: GPTConfig(n_embd=10, n_head=4), "n_embd=10"),
])
def test_impossible_requests_say_why(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_residual_projections_start_smaller():
    """GPT-2's initialisation: standard deviation s everywhere, and s/sqrt(2 n_layer) in the
    projections into the residual stream. Here s = 0.02 sqrt(768/n_embd)."""
    model = GPT(GPTConfig(n_layer=8, n_embd=192, n_head=4, vocab_size=500))
    s = 0.04
    mlp = model.h[3].mlp
    assert model.wte.weight.std().item() == pytest.approx(s, rel=0.05)
    assert mlp.c_fc.weight.std().item() == pytest.approx(s, rel=0.05)
    assert mlp.c_proj.weight.std().item() == pytest.approx(s / 4, rel=0.05)
    assert not mlp.c_fc.bias.any() and (model.ln_f.weight == 1).all()


# ---- Checkpoints

def test_checkpoint_round_trip(model, tmp_path):
    save_model(model, tmp_path / "m.pt", tokenizer="toy")
    again, facts = load_model(tmp_path / "m.pt")
    tokens = torch.randint(40, (2, 9))
    assert torch.equal(again.eval()(tokens), model(tokens)) and facts == {"tokenizer": "toy"}
    assert again.head.weight is again.wte.weight
    assert [f.name for f in tmp_path.iterdir()] == ["m.pt"], "something half-written was left"


def test_an_interrupted_save_leaves_the_old_checkpoint(model, tmp_path, monkeypatch):
    save_model(model, tmp_path / "m.pt", version=1)

    def die(obj, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "m.pt", version=2)
    assert load_model(tmp_path / "m.pt")[1] == {"version": 1}


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "x.pt").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="x.pt is not a checkpoint"):
        load_model(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "absent.pt")


def test_a_fingerprint_tells_weights_apart(model):
    """The same weights have the same fingerprint in any mode. A change of 1e-3 in one weight of
    any tensor shows in it."""
    before = fingerprint(model)
    assert fingerprint(model.train()) == before
    for p in model.parameters():
        with torch.no_grad():
            p.view(-1)[0] += 1e-3
            assert fingerprint(model) != before
            p.view(-1)[0] -= 1e-3


# ---- GPT-2's weights

def gpt2_folder(tmp_path, prefix="", **changes):
    """A folder as GPT-2 is published: config.json, and model.safetensors, in which the weights of
    a Conv1D are stored (in, out). Returns the model that was written into it."""
    torch.manual_seed(5)
    source = GPT(CONFIG)
    for p in source.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tensors = {}
    for name, value in source.state_dict().items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.t()
        if name != "head.weight":
            tensors[prefix + name] = value.contiguous().clone()
    for layer in range(2):  # its causal masks
        tensors[prefix + f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"n_positions": 24, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16,
              "model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return source


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_weights_load(tmp_path, prefix):
    source = gpt2_folder(tmp_path, prefix)
    loaded = GPT.from_pretrained(tmp_path).eval().double()
    tokens = torch.randint(40, (9,))
    oracle = plain_gpt(source.state_dict(), CONFIG, tokens.tolist())
    assert (loaded(tokens[None])[0] - oracle).abs().max() < 1e-9, \
        "the weights of a Conv1D are stored transposed"


@pytest.mark.parametrize("changes, message", [
    ({"n_layer": 3}, "h.2.ln_1.weight"), ({"n_embd": 32}, "shape"), ({"n_layer": 1}, "h.1."),
])
def test_gpt2_weights_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    gpt2_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_an_unknown_model_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="gpt2-medium"):
        GPT.from_pretrained("gpt5")
