"""From the formulas to the code: log-probabilities of whole responses, masks, padding, precision, batches. The oracles are
products of probabilities in plain floats, one token at a time."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpo
from model import GPT, GPTConfig
from tools import Bare, grades, masked_texts, assert_same, vector


def scored_by_hand(logits, tokens, scored):
    """sum of log p(tokens[t] | before) over t in scored, one softmax at a time; logits (T,V), tokens (T,) plain."""
    total = 0.0
    for t in scored:
        row = logits[t - 1]                              # the logits at t-1 predict token t
        top = max(row)
        total += row[tokens[t]] - top - math.log(sum(math.exp(x - top) for x in row))
    return total


def by_hand(logits, tokens, mask, shift=0):
    """`scored_by_hand` for every row: (B,)."""
    return vector(*(scored_by_hand(logits[b].tolist(), tokens[b].tolist(),
                                   [t for t in range(1, tokens.size(1)) if mask[b, min(t + shift, tokens.size(1) - 1)]])
                    for b in range(len(tokens))))


def response_mistakes(logits, tokens, mask):
    """What is often computed instead of log pi(y|x), and what it gives."""
    right, length = by_hand(logits, tokens, mask), mask[:, 1:].sum(-1)
    everything = torch.ones_like(mask)
    prompt_too = everything & (mask.flip(1).cumsum(1).flip(1) > 0)              # all up to the last response token
    first_half = torch.where((torch.arange(len(mask)) < len(mask) / 2)[:, None], prompt_too, mask)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)                          # EOS
    first = mask & (mask.cumsum(1) == 1)
    return {
        "you averaged over tokens; Eq. 7 sums": right / length.clamp(min=1),
        "you averaged over tokens, the empty row included: nan; Eq. 7 sums": right / length,
        "the prompt is counted: the mask is true on the response alone": by_hand(logits, tokens, prompt_too),
        "the prompt is counted in the first half of the batch: is the mask built for half of it?": by_hand(logits, tokens, first_half),
        "prompt and padding are counted: the mask is not used": by_hand(logits, tokens, everything),
        "the mask is off by one: token t is predicted by the logits at t-1, so mask[:, 1:] belongs to token_logps":
            by_hand(logits, tokens, mask, shift=-1),
        "the last response token, EOS, is left out: the model would never learn to stop": by_hand(logits, tokens, mask & ~last),
        "the first response token is left out: it is predicted by the last logits of the prompt": by_hand(logits, tokens, mask & ~first),
        "that is the negative log-likelihood: the sign is flipped": -right,
    }


# ---- One token at a time

@grades("token_logps")
@given(masked_texts())
def test_token_logps_are_log_softmax_shifted_by_one(text):
    """For every text: entry t is log p(token t+1 | tokens up to t), 1e-12."""
    logits, tokens, _ = text
    b, t, v = logits.shape
    want = torch.stack([vector(*(scored_by_hand(logits[i].tolist(), tokens[i].tolist(), [k]) for k in range(1, t))) for i in range(b)])
    logps = torch.log_softmax(logits, -1)
    assert_same(dpo.token_logps(logits, tokens), want, 1e-12, {
        "no shift: position t predicts token t+1, so logits[:, :-1] go with tokens[:, 1:]":
            logps[:, :-1].gather(2, tokens[:, :-1, None]).squeeze(2),
        "not shifted and not shortened: (B, T) values, of which the last predicts nothing": logps.gather(2, tokens[:, :, None]).squeeze(2),
        "shifted the wrong way: the logits at t+1 have already seen token t+1": logps[:, 1:].gather(2, tokens[:, :-1, None]).squeeze(2),
        "the logits at t have already seen token t: use logits[:, :-1]": logps[:, 1:].gather(2, tokens[:, 1:, None]).squeeze(2),
        "raw logits, not normalised: take log_softmax": logits[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2),
        "probabilities; wanted their logs": want.exp(),
        "the sign is flipped: that is the negative log-likelihood": -want}, what="token_logps")


@grades("token_logps")
def test_oracle_gather():
    """Numbers from another hand: two positions. tokens[0] only leads in; the last logits predict nothing."""
    logits = torch.tensor([[[2, 1, .1], [.5, 2.5, .3], [9, 9, 9]]])
    logps = dpo.token_logps(logits, torch.tensor([[1, 0, 2]]))
    assert_same(-logps.mean(), torch.tensor(1.4185), 5e-5, what="the mean negative log-probability")
    assert logps.shape == (1, 2), f"{tuple(logps.shape)}: T tokens have T-1 predictions"


@grades("token_logps")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    """The softmax of half-precision logits in float32 (1e-5): in half precision a sum of 100 tokens is off by several units."""
    logits, tokens = (5 * torch.randn(2, 9, 50)).to(dtype), torch.randint(50, (2, 9))
    logps = dpo.token_logps(logits, tokens)
    assert logps.dtype == torch.float32, f"{logps.dtype}: log_softmax was taken in half precision"
    want = torch.log_softmax(logits.double(), -1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    assert_same(logps, want.float(), 1e-5, what="token_logps of half-precision logits")


@grades("token_logps")
def test_float64_stays_float64():
    """Gradient checks need it: differences of 1e-5 drown in float32."""
    assert dpo.token_logps(torch.zeros(1, 3, 4, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.long)).dtype == torch.float64


@grades("token_logps")
def test_logits_of_another_text_are_refused():
    for logits in (torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(1, 4, 4), torch.zeros(3, 4, 4)):
        try:
            dpo.token_logps(logits, torch.zeros(2, 4, dtype=torch.long))
        except ValueError as error:
            assert str(tuple(logits.shape)) in str(error) and "(2, 4)" in str(error), "the message must show both shapes"
        else:
            raise AssertionError(f"logits {tuple(logits.shape)} for tokens (2, 4) are accepted; wanted a ValueError")


# ---- Whole responses

@grades("response_logps")
@given(masked_texts())
def test_response_logps_are_the_log_of_the_product_of_probabilities(text):
    """Claim 44: summed over the response's tokens, for masks of any shape, the empty one included (then 0), 1e-11."""
    logits, tokens, mask = text
    assert_same(dpo.response_logps(logits, tokens, mask), by_hand(logits, tokens, mask), 1e-11,
         response_mistakes(logits, tokens, mask), what="log pi(y|x)")


@grades("response_logps")
def test_uniform_logits_give_minus_n_ln_v():
    """Claim 44. A sum of n terms -ln V: a mean would give -ln V whatever n (the objective of another paper)."""
    mask = torch.tensor([[False, False, True, True, True], [False, True, False, False, False]])
    logps = dpo.response_logps(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long), mask)
    v = math.log(7)
    assert_same(logps, torch.tensor([-3 * v, -v]), 1e-6, {
        "you averaged over tokens; Eq. 7 sums": torch.tensor([-v, -v]), "the prompt is counted": torch.tensor([-4 * v, -v]),
        "everything is counted, prompt and padding: the mask is not used": torch.tensor([-4 * v, -4 * v]),
        "the last response token is left out": torch.tensor([-2 * v, 0.0])}, what="log pi of 3 tokens, and of 1, over 7")


@grades("response_logps")
@given(masked_texts())
def test_average_divides_by_the_number_of_response_tokens(text):
    """average=True, for IPO as its authors run it; an empty row gives 0, not nan."""
    logits, tokens, mask = text
    n = mask[:, 1:].sum(-1)
    assert_same(dpo.response_logps(logits, tokens, mask, average=True), by_hand(logits, tokens, mask) / n.clamp(min=1), 1e-11, {
        "average is ignored: this is the sum": by_hand(logits, tokens, mask),
        "an empty row gives nan: divide by at least 1": by_hand(logits, tokens, mask) / n,
        "divided by all tokens, prompt and padding included": by_hand(logits, tokens, mask) / (tokens.size(1) - 1)}, what="the average")


@grades("response_logps")
def test_prompt_and_padding_do_not_count():
    """Claim 44, asserted on log-probabilities: in the loss, a prompt counted on both sides would cancel and hide. Another prompt,
    another padding id, other logits where no response token is predicted: nothing changes, to the bit."""
    logits, tokens = torch.randn(2, 8, 5), torch.randint(5, (2, 8))
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 3:6] = True
    before = dpo.response_logps(logits, tokens, mask)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 5       # another padding id
    assert torch.equal(dpo.response_logps(logits, changed, mask), before), "padding is scored: look at the mask"
    changed[:, :3] = (changed[:, :3] + 1) % 5       # another prompt, with the logits held fixed
    for row, half in enumerate(("first", "second")):
        assert dpo.response_logps(logits, changed, mask)[row] == before[row], f"the prompt is counted in the {half} half of the batch"
    noisy = logits.clone()
    noisy[:, [0, 1, 5, 6, 7]] += torch.randn(2, 5, 5)            # positions that predict tokens outside the response
    assert torch.equal(dpo.response_logps(noisy, tokens, mask), before), "a prediction outside the response is counted"
    noisy[:, 2, 0] += 1                             # position 2 predicts the first response token
    assert (dpo.response_logps(noisy, tokens, mask) != before).all(), "the first response token is predicted one position earlier"


@grades("response_logps")
def test_last_response_token_counts():
    """Claim 44. EOS is the last response token: leave it out and the model never learns to stop. Here it ends the row too."""
    logits, tokens, mask = torch.randn(1, 4, 5), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, False, True, True]])
    full = dpo.response_logps(logits, tokens, mask)
    without = dpo.response_logps(logits, tokens, torch.tensor([[False, False, True, False]]))
    assert_same((full - without)[0], torch.log_softmax(logits[0, 2], -1)[4], 1e-6, {"the last token is not scored": torch.tensor(0.0)},
         what="what EOS adds")


@grades("response_logps")
@pytest.mark.parametrize("average", [False, True])
def test_a_row_without_response_is_finite_even_beside_infinite_logits(average):
    """-inf x 0 is nan, and so is 0/0: select with the mask, do not multiply by it."""
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = -math.inf
    value = dpo.response_logps(logits, torch.tensor([[0, 2, 1]]), torch.zeros(1, 3, dtype=torch.bool), average)
    assert_same(value, torch.zeros(1), 0, {"nan: select with the mask (torch.where), do not multiply by it": torch.full((1,), math.nan)},
         what="log pi of an empty response")


@grades("response_logps")
def test_a_mask_of_another_shape_is_refused():
    """(2,2) for tokens (2,3), and (2,1), which would broadcast."""
    for wrong in ((2, 2), (2, 1), (3,)):
        try:
            dpo.response_logps(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), torch.ones(wrong).bool())
        except ValueError as error:
            assert str(wrong) in str(error) and "(2, 3)" in str(error), "the message must show both shapes"
        else:
            raise AssertionError(f"a mask of shape {wrong} for tokens (2, 3) is accepted; wanted a ValueError")


@grades("response_logps")
def test_a_mask_of_zeros_and_ones_will_do():
    """Integer masks, as many libraries hand them over, mean what boolean ones mean."""
    logits, tokens, mask = torch.randn(2, 6, 5), torch.randint(5, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]])
    for average in (False, True):
        assert_same(dpo.response_logps(logits, tokens, mask, average), dpo.response_logps(logits, tokens, mask.bool(), average), 0,
             what="log pi with a mask of 0 and 1")


# ---- Padding, and where it stands

def layouts(side, texts, width, pad_id):
    """Texts (prompt length, ids) padded to width on one side: tokens, mask."""
    tokens, mask = torch.full((len(texts), width), pad_id), torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (n, ids) in enumerate(texts):
        start = 0 if side == "right" else width - len(ids)
        tokens[row, start:start + len(ids)] = torch.tensor(ids)
        mask[row, start + n:start + len(ids)] = True
    return tokens, mask


TEXTS = [(2, [3, 1, 4, 1]), (3, [5, 9, 2, 6, 5, 3, 5]), (1, [8, 9])]


@grades("response_logps")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad_id", [0, 9])
def test_padding_on_either_side_changes_nothing(side, pad_id):
    """Claim 44, for the log-probabilities: the mask alone says where a response stands. Logits of each text by itself, laid out
    with padding on the right or on the left, any pad id, any logits at the padding: the same to 1e-6."""
    tokens, mask = layouts(side, TEXTS, 9, pad_id)
    logits, want = torch.randn(3, 9, 10), []
    for row, (n, ids) in enumerate(TEXTS):
        alone = torch.randn(len(ids), 10)
        start = 0 if side == "right" else 9 - len(ids)
        logits[row, start:start + len(ids)] = alone
        want.append(scored_by_hand(alone.tolist(), ids, range(n, len(ids))))
    assert_same(dpo.response_logps(logits, tokens, mask), torch.tensor(want), 1e-6, {
        "padding is scored": by_hand(logits, tokens, mask | (tokens == pad_id)).float()}, what=f"log pi, padded on the {side}")


def test_a_gpt_is_padded_on_the_right():
    """Claim 44, for the model, corrected: GPT-2's positions are absolute, so padding on the right changes nothing (1e-6), and
    padding on the left without telling the model shifts every position and changes every score. This code pads on the
    right only; generation takes ragged prompts as they are (test_greedy_generation_with_cache_without_and_by_hand)."""
    model = GPT(GPTConfig(block_size=9, vocab_size=10, n_layer=2, n_head=2, n_embd=8)).double()
    alone = torch.cat([dpo.response_logps(model(t), t, m) for t, m in (layouts("right", [text], len(text[1]), 0) for text in TEXTS)])
    for pad_id in (0, 9):
        tokens, mask = layouts("right", TEXTS, 9, pad_id)
        assert_same(dpo.response_logps(model(tokens), tokens, mask), alone, 1e-6, what="log pi, padded on the right")
    tokens, mask = layouts("left", TEXTS, 9, 0)
    assert ((dpo.response_logps(model(tokens), tokens, mask) - alone).abs() > 1e-4).all(), "then claim 44 holds as it was written"


# ---- The shortcut, and pairs

@grades("sequence_logps")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_head_on_response_positions_alone_gives_the_same(dtype, tolerance):
    """Ragged masks, one of them empty: the shortcut against one token at a time, and its gradient against that of the
    full logits."""
    model = GPT(GPTConfig(block_size=9, vocab_size=13, n_layer=1, n_head=2, n_embd=8)).to(dtype)
    tokens, position = torch.randint(13, (4, 9)), torch.arange(9)
    mask = (position >= torch.tensor([1, 3, 5, 4])[:, None]) & (position < torch.tensor([9, 6, 5, 8])[:, None])
    short = dpo.sequence_logps(model, tokens, mask)
    logits = model(tokens)
    assert_same(short.detach(), by_hand(logits.detach(), tokens, mask).to(dtype), tolerance, {
        k: v.to(dtype) for k, v in response_mistakes(logits.detach(), tokens, mask).items()}, what="log pi(y|x)")
    logps = torch.log_softmax(logits[:, :-1], -1).gather(2, tokens[:, 1:, None]).squeeze(2)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=dtype)
    plain = ((logps * mask[:, 1:]).sum(-1) * weights).sum()
    for a, b in zip(torch.autograd.grad((short * weights).sum(), list(model.parameters())),
                    torch.autograd.grad(plain, list(model.parameters())), strict=True):
        assert_same(a, b, tolerance * 10, what="its gradient")


class Heavy(torch.nn.Module):
    """A model in half precision that counts the positions its head is asked for."""
    def __init__(self, dtype):
        super().__init__()
        self.states = (3 * torch.randn(2, 6, 8)).to(dtype)
        self.weight, self.asked = torch.randn(30, 8).to(dtype), []

    def hidden(self, tokens):
        return self.states

    def head(self, states):
        self.asked.append(tuple(states.shape))
        return states @ self.weight.T


@grades("sequence_logps")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_shortcut_runs_the_head_where_it_must_and_scores_in_float32(dtype):
    """The head sees one state per response token and no more, those before each of them; half-precision logits are scored in
    float32 (1e-4 on a sum of 4), and the result is float32."""
    model, tokens = Heavy(dtype), torch.randint(30, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    logps = dpo.sequence_logps(model, tokens, mask)
    assert model.asked == [(4, 8)], f"the head was run on {model.asked}; wanted the 4 positions that predict a response token"
    assert logps.dtype == torch.float32, f"{logps.dtype}: log_softmax was taken in half precision"
    assert_same(logps, by_hand(model.head(model.states).double(), tokens, mask).float(), 1e-4, what="log pi(y|x)")


@grades("pair_logps")
def test_pair_logps_splits_chosen_from_rejected(tiny):
    """The first B rows are the chosen, the last B the rejected; values by hand (1e-12), for a GPT and for a bare module."""
    policy, batch = tiny
    want = by_hand(policy(batch["tokens"]).detach(), batch["tokens"], batch["response_mask"])
    for model in (policy, Bare(policy)):
        pair = dpo.pair_logps(model, batch)
        assert pair is not None and len(pair) == 2, "wanted two results, the chosen log-probs and the rejected ones"
        for got, rows, other, name in ((pair[0], slice(0, 3), slice(3, 6), "chosen"), (pair[1], slice(3, 6), slice(0, 3), "rejected")):
            assert_same(got.detach(), want[rows], 1e-12, {
                "chosen and rejected are swapped: the chosen rows come first": want[other],
                "every other row was taken: the batch is all chosen, then all rejected": want[name == "rejected"::2]}
                | {k: v[rows] for k, v in response_mistakes(policy(batch["tokens"]).detach(), batch["tokens"],
                                                           batch["response_mask"]).items()}, what=f"the {name} log-probs")
            assert got.requires_grad, "the log-probs are cut off from the policy's parameters"


@grades("pair_logps")
def test_pair_logps_run_the_model_once(tiny):
    """One forward pass for both halves: half the time, and with dropout the same network for both."""
    policy, batch = tiny
    calls = []
    policy.wte.register_forward_hook(lambda *_: calls.append(1))
    dpo.pair_logps(policy, batch)
    assert len(calls) == 1, f"the model was run {len(calls)} times"


def test_eight_microbatches_are_one_batch_of_eight():
    """Claim 46. The gradient of the mean over eight pairs, and the mean of the gradients of single pairs: 1e-6 in float32. What
    two processes would average is the same sum. (The trainer's own accumulation: test_eight_parts_of_one_are_one_batch_of_eight.)"""
    model = GPT(GPTConfig(block_size=9, vocab_size=13, n_layer=1, n_head=2, n_embd=8))
    tokens, ref = torch.randint(13, (16, 9)), torch.randn(2, 8) - 15
    mask = torch.arange(9)[None] >= torch.randint(2, 6, (16, 1))

    def gradient(pairs):
        rows = torch.cat([pairs, pairs + 8])
        chosen, rejected = dpo.pair_logps(model, {"tokens": tokens[rows], "response_mask": mask[rows]})
        loss = dpo.dpo_loss(chosen, rejected, ref[0, pairs], ref[1, pairs], beta=0.5)[0].mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    whole = gradient(torch.arange(8))
    parts = [gradient(torch.tensor([i])) for i in range(8)]
    assert_same(sum(parts) / 8, whole, 1e-6, {"summed, not averaged": sum(parts)}, what="the accumulated gradient")
    assert whole.abs().max() > 1e-3
    uneven = gradient(torch.arange(5)) * 5 / 8 + gradient(torch.arange(5, 8)) * 3 / 8
    assert_same(uneven, whole, 1e-6, what="the gradient of parts of 5 and 3, weighted by their size,")
