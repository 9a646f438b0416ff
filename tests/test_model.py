"""model.py: the transformer against one written without it, the cache, generation, checkpoints."""
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from dpo import response_logps
from model import GPT, GPTConfig, load_model, sample, save_model

CONFIG = GPTConfig(block_size=24, vocab_size=40, n_layer=2, n_head=2, n_embd=16)


def plain_gpt(state, config, tokens):
    """A second GPT-2, token by token and head by head, from a state dict alone: the oracle. float64."""
    w = {k: v.double() for k, v in state.items()}
    layer_norm = lambda x, n: ((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()) * w[n + ".weight"] + w[n + ".bias"]
    linear = lambda x, n: w[n + ".weight"] @ x + w[n + ".bias"]
    gelu = lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    size = config.n_embd // config.n_head
    xs = [w["wte.weight"][t] + w["wpe.weight"][i] for i, t in enumerate(tokens)]
    for layer in range(config.n_layer):
        name = f"h.{layer}."
        qkv = [linear(layer_norm(x, name + "ln_1"), name + "attn.c_attn").chunk(3) for x in xs]
        for t in range(len(xs)):
            heads = []
            for h in range(config.n_head):
                s = slice(h * size, (h + 1) * size)
                scores = torch.stack([qkv[t][0][s] @ qkv[j][1][s] / math.sqrt(size) for j in range(t + 1)])
                heads.append(sum(p * qkv[j][2][s] for j, p in enumerate(scores.softmax(0))))
            xs[t] = xs[t] + linear(torch.cat(heads), name + "attn.c_proj")
            xs[t] = xs[t] + linear(gelu(linear(layer_norm(xs[t], name + "ln_2"), name + "mlp.c_fc")), name + "mlp.c_proj")
    return torch.stack([w["wte.weight"] @ layer_norm(x, "ln_f") for x in xs])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


def test_forward_is_the_transformer_written_out(model):
    """All positions, against the oracle above; float64, tolerance 1e-10."""
    model.double()
    tokens = torch.randint(40, (9,))
    logits = model(tokens[None])
    assert logits.shape == (1, 9, 40)
    assert (logits[0] - plain_gpt(model.state_dict(), CONFIG, tokens.tolist())).abs().max() < 1e-10


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
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5, f"cache read in pieces of {pieces}"


def test_padding_changes_nothing(model):
    """Padded and unpadded log-probabilities of the same texts: 1e-5 in float32, whatever the pad id."""
    texts = [torch.randint(40, (n,)).tolist() for n in (4, 9, 6)]
    for pad_id in (0, 39):
        tokens = torch.tensor([t + [pad_id] * (12 - len(t)) for t in texts])
        mask = torch.tensor([[2 <= i < len(t) for i in range(12)] for t in texts])
        together = response_logps(model(tokens), tokens, mask)
        for text, logp in zip(texts, together):
            alone = torch.tensor([text])
            assert abs(response_logps(model(alone), alone, torch.arange(len(text))[None] >= 2).item() - logp.item()) < 1e-5


def test_greedy_generation_with_cache_without_and_by_hand(model):
    """Ragged prompts: cached = uncached = each prompt alone = argmax of a full forward, token for token."""
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
    free = model.generate([[7, 8], [9, 10, 11]], 12, temperature=0)
    eos = free[0][3]
    stopped = model.generate([[7, 8], [9, 10, 11]], 12, temperature=0, eos_id=eos)
    for full, cut in zip(free, stopped):
        assert cut == (full[:full.index(eos) + 1] if eos in full else full)


def test_samples_follow_the_model(model):
    """20,000 samples of one next token against softmax: every frequency within 5 standard errors."""
    prompt = [3, 1, 4]
    for temperature in (1.0, 0.5):
        p = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
        drawn = torch.tensor(model.generate([prompt] * 20000, 1, temperature=temperature)).flatten()
        share = torch.bincount(drawn, minlength=40) / 20000
        assert ((share - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt() + 1e-9).all()


def test_top_k_samples_among_the_k_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(2000, -1)
    assert set(sample(logits, top_k=2).tolist()) == {1, 3}
    assert set(sample(logits, top_k=1).tolist()) == {1}


def test_generate_leaves_the_mode_and_ignores_dropout():
    model = GPT(GPTConfig(block_size=24, vocab_size=40, n_layer=1, n_head=2, n_embd=16, dropout=0.5)).train()
    a, b = (model.generate([[1, 2]], 8, temperature=0) for _ in "ab")
    assert a == b and model.training


@pytest.mark.parametrize("call, message", [
    (lambda m: m(torch.zeros(1, 25, dtype=torch.long)), "block_size=24"),
    (lambda m: m.generate([[1] * 20], 5), "block_size=24"),
    (lambda m: m.generate([[]], 5), "at least one token"),
    (lambda m: m.generate([[1]], 5, temperature=-1), "temperature=-1"),
    (lambda m: GPTConfig(n_embd=10, n_head=4), "n_embd=10")])
def test_impossible_requests_say_why(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_residual_projections_start_smaller():
    """GPT-2's initialisation: std s everywhere, s/sqrt(2 n_layer) into the residual stream; here s = 0.02 sqrt(768/n_embd)."""
    model = GPT(GPTConfig(n_layer=8, n_embd=192, n_head=4, vocab_size=500))
    s = 0.04
    assert model.wte.weight.std().item() == pytest.approx(s, rel=0.05)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(s, rel=0.05)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(s / 4, rel=0.05)
    assert not model.h[3].mlp.c_fc.bias.any() and (model.ln_f.weight == 1).all()


# ---- Checkpoints and GPT-2's weights

def test_checkpoint_round_trip(model, tmp_path):
    save_model(model, tmp_path / "m.pt", tokenizer="toy")
    again, facts = load_model(tmp_path / "m.pt")
    tokens = torch.randint(40, (2, 9))
    assert torch.equal(again.eval()(tokens), model(tokens)) and facts == {"tokenizer": "toy"}
    assert again.head.weight is again.wte.weight
    assert [f.name for f in tmp_path.iterdir()] == ["m.pt"], "nothing half-written stays behind"


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


def gpt2_folder(tmp_path, prefix="", **changes):
    """A folder as GPT-2 is published: config.json, model.safetensors, Conv1D weights stored (in, out)."""
    torch.manual_seed(5)
    source = GPT(CONFIG)
    for p in source.parameters():
        torch.nn.init.normal_(p, std=0.3)
    conv = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {prefix + k: (v.t() if k.endswith(conv) else v).contiguous().clone() for k, v in source.state_dict().items()
               if k != "head.weight"}
    tensors |= {prefix + f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24) for i in range(2)}      # its causal masks
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"n_positions": 24, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "model_type": "gpt2"} | changes
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return source


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_weights_load(tmp_path, prefix):
    source = gpt2_folder(tmp_path, prefix)
    loaded = GPT.from_pretrained(tmp_path).eval().double()
    tokens = torch.randint(40, (9,))
    oracle = plain_gpt(source.state_dict(), CONFIG, tokens.tolist())
    assert (loaded(tokens[None])[0] - oracle).abs().max() < 1e-9, "Conv1D weights are stored transposed"


@pytest.mark.parametrize("changes, message", [({"n_layer": 3}, "h.2.ln_1.weight"), ({"n_embd": 32}, "shape"),
                                              ({"n_layer": 1}, "h.1.")])
def test_gpt2_weights_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    gpt2_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_an_unknown_model_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="gpt2-medium"):
        GPT.from_pretrained("gpt5")
