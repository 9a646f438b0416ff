"""From the formulas to the code: log-probabilities of whole responses, masks, padding, precision
and batches. Each result is compared with products of probabilities in plain floats, one token at a
time."""
import math

import pytest
import torch
from hypothesis import given

import dpo
import model
from model import GPT, GPTConfig
from tools import Bare, assert_same, grades, masked_texts, vector


def scored_by_hand(logits, tokens, scored):
    """The sum of log p(tokens[t] | the tokens before) over t in scored, one softmax at a time.

    logits (T,V) and tokens (T,): plain lists.
    """
    total = 0.0
    for t in scored:
        row = logits[t - 1]  # the logits at t-1 predict token t
        top = max(row)
        total += row[tokens[t]] - top - math.log(sum(math.exp(x - top) for x in row))
    return total


def by_hand(logits, tokens, mask, shift=0):
    """`scored_by_hand` for every row: (B,). Token t counts where mask[t + shift] is true."""
    sums = []
    last = tokens.size(1) - 1
    for b in range(len(tokens)):
        scored = [t for t in range(1, last + 1) if mask[b, min(t + shift, last)]]
        sums.append(scored_by_hand(logits[b].tolist(), tokens[b].tolist(), scored))
    return vector(*sums)


def response_mistakes(logits, tokens, mask):
    """What is often computed instead of log pi(y|x), and the value that it gives."""
    right, length = by_hand(logits, tokens, mask), mask[:, 1:].sum(-1)
    everything = torch.ones_like(mask)
    still_to_come = mask.flip(1).cumsum(1).flip(1)
    prompt_too = everything & (still_to_come > 0)  # all tokens up to the last one of the response
    is_first_half = torch.arange(len(mask)) < len(mask) / 2
    half = torch.where(is_first_half[:, None], prompt_too, mask)
    last = mask & (still_to_come == 1)  # EOS
    first = mask & (mask.cumsum(1) == 1)
    return {
        "you averaged over tokens; Eq. 7 sums": right / length.clamp(min=1),
        "you averaged over tokens, and an empty row gives nan; Eq. 7 sums": right / length,
        "the prompt is counted. The mask is true on the response alone":
            by_hand(logits, tokens, prompt_too),
        "the prompt is counted in the first half of the batch. Is the mask built for half of it?":
            by_hand(logits, tokens, half),
        "prompt and padding are counted. The mask is not used":
            by_hand(logits, tokens, everything),
        "the mask is off by one. The logits at t-1 predict token t, so mask[:, 1:] belongs to "
        "token_logps": by_hand(logits, tokens, mask, shift=-1),
        "the last response token, EOS, is left out. The model would never learn to stop":
            by_hand(logits, tokens, mask & ~last),
        "the first response token is left out. The last logits of the prompt predict it":
            by_hand(logits, tokens, mask & ~first),
        "this is the negative log-likelihood. The sign is flipped": -right,
    }


# ---- One token at a time

@grades("token_logps")
@given(masked_texts())
def test_token_logps_are_log_softmax_shifted_by_one(text):
    """For every text, entry t is log p(token t+1 | tokens up to t), to 1e-12."""
    logits, tokens, _ = text
    rows = []
    for b in range(len(tokens)):
        plain_logits, plain_tokens = logits[b].tolist(), tokens[b].tolist()
        each = [scored_by_hand(plain_logits, plain_tokens, [t]) for t in range(1, tokens.size(1))]
        rows.append(vector(*each))
    want = torch.stack(rows)  # (B, T-1)
    logps = torch.log_softmax(logits, -1)

    def gather(values, of):
        return values.gather(2, of[:, :, None]).squeeze(2)

    assert_same(dpo.token_logps(logits, tokens), want, 1e-12, {
        "nothing is shifted. Position t predicts token t+1, so logits[:, :-1] belong to "
        "tokens[:, 1:]": gather(logps[:, :-1], tokens[:, :-1]),
        "nothing is shifted, and the last prediction is still there. There are T-1 predictions":
            gather(logps, tokens),
        "it is shifted in the wrong direction. The logits at t+1 have already seen token t+1":
            gather(logps[:, 1:], tokens[:, :-1]),
        "the logits at t have already seen token t. Use logits[:, :-1]":
            gather(logps[:, 1:], tokens[:, 1:]),
        "these are raw logits, not normalised. Take log_softmax":
            gather(logits[:, :-1], tokens[:, 1:]),
        "these are probabilities; wanted their logs": want.exp(),
        "this is the negative log-likelihood. The sign is flipped": -want,
    }, what="token_logps")


@grades("token_logps")
def test_oracle_gather():
    """Two predictions whose mean was computed elsewhere. Nothing predicts tokens[0], and the last
    logits predict nothing."""
    logits = torch.tensor([[[2, 1, .1], [.5, 2.5, .3], [9, 9, 9]]])
    logps = dpo.token_logps(logits, torch.tensor([[1, 0, 2]]))
    assert_same(-logps.mean(), torch.tensor(1.4185), 5e-5,
                what="the mean negative log-probability")
    assert logps.shape == (1, 2), (
        f"token_logps has shape {tuple(logps.shape)}, but T tokens have T-1 predictions")


@grades("token_logps")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    """Half-precision logits get their softmax in float32 (1e-5). In half precision a sum of 100
    tokens would be off by several units."""
    logits, tokens = (5 * torch.randn(2, 9, 50)).to(dtype), torch.randint(50, (2, 9))
    logps = dpo.token_logps(logits, tokens)
    assert logps.dtype == torch.float32, (
        f"the result is {logps.dtype}: log_softmax was taken in half precision")
    want = torch.log_softmax(logits.double(), -1)[:, :-1]
    want = want.gather(2, tokens[:, 1:, None]).squeeze(2)
    assert_same(logps, want.float(), 1e-5, what="token_logps of half-precision logits")


@grades("token_logps")
def test_float64_stays_float64():
    """Gradient checks need float64. In float32, differences of 1e-5 are lost in rounding."""
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logps = dpo.token_logps(logits, torch.zeros(1, 3, dtype=torch.long))
    assert logps.dtype == torch.float64, f"the result is {logps.dtype}; wanted float64"


@grades("token_logps")
def test_logits_of_another_text_are_refused():
    """A ValueError shows both shapes."""
    tokens = torch.zeros(2, 4, dtype=torch.long)
    for shape in ((2, 3, 4), (2, 5, 4), (1, 4, 4), (3, 4, 4)):
        try:
            dpo.token_logps(torch.zeros(shape), tokens)
        except ValueError as error:
            assert str(shape) in str(error) and "(2, 4)" in str(error), (
                f"the message must show both shapes, {shape} and (2, 4). It is {str(error)!r}")
        else:
            raise AssertionError(f"logits {shape} for tokens (2, 4) are accepted; wanted a "
                                 "ValueError that shows both shapes")


# ---- Whole responses

@grades("response_logps")
@given(masked_texts())
def test_response_logps_are_the_log_of_the_product_of_probabilities(text):
    """Claim 44. The sum runs over the response's tokens, for masks of any form.

    It is compared with plain floats, one token at a time, to 1e-11. The empty mask has the sum 0.
    """
    logits, tokens, mask = text
    assert_same(dpo.response_logps(logits, tokens, mask), by_hand(logits, tokens, mask), 1e-11,
                response_mistakes(logits, tokens, mask), what="log pi(y|x)")


@grades("response_logps")
def test_uniform_logits_give_minus_n_ln_v():
    """Claim 44. A response of n tokens has a sum of n terms -ln V, to 1e-6. A mean would be -ln V
    for every n, which is the objective of another paper."""
    mask = torch.tensor([[False, False, True, True, True], [False, True, False, False, False]])
    logps = dpo.response_logps(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long), mask)
    v = math.log(7)
    assert_same(logps, torch.tensor([-3 * v, -v]), 1e-6, {
        "you averaged over tokens; Eq. 7 sums": torch.tensor([-v, -v]),
        "the prompt is counted": torch.tensor([-4 * v, -v]),
        "prompt and padding are counted. The mask is not used": torch.tensor([-4 * v, -4 * v]),
        "the last response token is left out": torch.tensor([-2 * v, 0.0]),
    }, what="log pi of 3 tokens, and of 1 token, from a vocabulary of 7")


@grades("response_logps")
@given(masked_texts())
def test_average_divides_by_the_number_of_response_tokens(text):
    """average=True is for IPO as its authors run it. A row without a response gives 0, not nan."""
    logits, tokens, mask = text
    total, n = by_hand(logits, tokens, mask), mask[:, 1:].sum(-1)
    got = dpo.response_logps(logits, tokens, mask, average=True)
    assert_same(got, total / n.clamp(min=1), 1e-11, {
        "average is ignored. This is the sum": total,
        "an empty row gives nan: divide by at least 1": total / n,
        "it is divided by the number of all tokens, prompt and padding included":
            total / (tokens.size(1) - 1),
    }, what="the average")


@grades("response_logps")
def test_prompt_and_padding_do_not_count():
    """Claim 44, on log-probabilities. In the loss, a prompt that is counted for both responses
    would cancel, and nobody would see it.

    The padding id is changed, then the prompt, then the logits that predict no response token. The
    results are compared exactly: no bit changes.
    """
    logits, tokens = torch.randn(2, 8, 5), torch.randint(5, (2, 8))
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 3:6] = True
    before = dpo.response_logps(logits, tokens, mask)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 5  # another padding id
    assert torch.equal(dpo.response_logps(logits, changed, mask), before), (
        "the padding is scored. Look at the mask")
    changed[:, :3] = (changed[:, :3] + 1) % 5  # another prompt, with the same logits
    after = dpo.response_logps(logits, changed, mask)
    assert after[0] == before[0], "the prompt is counted in the first half of the batch"
    assert after[1] == before[1], "the prompt is counted in the second half of the batch"
    noisy = logits.clone()
    noisy[:, [0, 1, 5, 6, 7]] += torch.randn(2, 5, 5)  # they predict tokens outside the response
    assert torch.equal(dpo.response_logps(noisy, tokens, mask), before), (
        "a prediction outside the response is counted")
    noisy[:, 2, 0] += 1  # position 2 predicts the first response token
    assert (dpo.response_logps(noisy, tokens, mask) != before).all(), (
        "the first response token is not counted. The position before it predicts it")


@grades("response_logps")
def test_last_response_token_counts():
    """Claim 44. EOS is the last response token. A model that is not scored on EOS never learns to
    stop. What EOS adds to the sum is compared with its own log-probability, to 1e-6."""
    logits, tokens = torch.randn(1, 4, 5), torch.tensor([[1, 2, 3, 4]])
    with_eos = torch.tensor([[False, False, True, True]])
    without_eos = torch.tensor([[False, False, True, False]])
    full = dpo.response_logps(logits, tokens, with_eos)
    without = dpo.response_logps(logits, tokens, without_eos)
    assert_same((full - without)[0], torch.log_softmax(logits[0, 2], -1)[4], 1e-6,
                {"the last token is not scored": torch.tensor(0.0)}, what="what EOS adds")


@grades("response_logps")
@pytest.mark.parametrize("average", [False, True])
def test_a_row_without_response_is_finite_even_beside_infinite_logits(average):
    """-inf x 0 is nan, and so is 0/0. So the mask must select: a product with the mask would give
    nan."""
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = -math.inf
    mask = torch.zeros(1, 3, dtype=torch.bool)
    value = dpo.response_logps(logits, torch.tensor([[0, 2, 1]]), mask, average)
    nan = torch.full((1,), math.nan)
    assert_same(value, torch.zeros(1), 0, {
        "nan: select with the mask (torch.where), do not multiply by it": nan},
        what="log pi of an empty response")


@grades("response_logps")
def test_a_mask_of_another_shape_is_refused():
    """For tokens (2,3): masks (2,2) and (3,), and (2,1), which would broadcast. A ValueError shows
    both shapes."""
    logits, tokens = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    for wrong in ((2, 2), (2, 1), (3,)):
        try:
            dpo.response_logps(logits, tokens, torch.ones(wrong).bool())
        except ValueError as error:
            assert str(wrong) in str(error) and "(2, 3)" in str(error), (
                f"the message must show both shapes, {wrong} and (2, 3). It is {str(error)!r}")
        else:
            raise AssertionError(f"a mask of shape {wrong} for tokens (2, 3) is accepted; wanted a "
                                 "ValueError that shows both shapes")


@grades("response_logps")
def test_a_mask_of_zeros_and_ones_will_do():
    """Many libraries use masks of integers. They mean the same as masks of booleans."""
    logits, tokens = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]])
    for average in (False, True):
        assert_same(dpo.response_logps(logits, tokens, mask, average),
                    dpo.response_logps(logits, tokens, mask.bool(), average), 0,
                    what="log pi with a mask of 0 and 1")


# ---- Padding, on the right and on the left

TEXTS = [(2, [3, 1, 4, 1]), (3, [5, 9, 2, 6, 5, 3, 5]), (1, [8, 9])]  # (length of the prompt, ids)


def layouts(side, texts, width, pad_id):
    """Texts (prompt length, ids), padded to width on one side: tokens, mask."""
    tokens = torch.full((len(texts), width), pad_id)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (n, ids) in enumerate(texts):
        start = 0 if side == "right" else width - len(ids)
        tokens[row, start:start + len(ids)] = torch.tensor(ids)
        mask[row, start + n:start + len(ids)] = True
    return tokens, mask


@grades("response_logps")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad_id", [0, 9])
def test_padding_on_either_side_changes_nothing(side, pad_id):
    """Claim 44, for the log-probabilities. The mask alone decides which tokens are the response.

    Each text has its own logits. They are laid out with padding on the right or on the left, with
    any padding id and any logits at the padding. The result is the same, to 1e-6.
    """
    tokens, mask = layouts(side, TEXTS, 9, pad_id)
    logits, want = torch.randn(3, 9, 10), []
    for row, (n, ids) in enumerate(TEXTS):
        alone = torch.randn(len(ids), 10)
        start = 0 if side == "right" else 9 - len(ids)
        logits[row, start:start + len(ids)] = alone
        want.append(scored_by_hand(alone.tolist(), ids, range(n, len(ids))))
    padding_too = mask | (tokens == pad_id)
    assert_same(dpo.response_logps(logits, tokens, mask), torch.tensor(want), 1e-6, {
        "the padding is scored": by_hand(logits, tokens, padding_too).float()},
        what=f"log pi, padded on the {side}")


def test_a_gpt_is_padded_on_the_right():
    """Claim 44, for the model, corrected. GPT-2's positions are absolute.

    So padding on the right changes nothing (1e-6). Padding on the left shifts every position of a
    model that is not told of it, and changes every score. This code pads on the right only.
    Generation takes prompts of different lengths as they are
    (test_greedy_generation_with_cache_without_and_by_hand).
    """
    config = GPTConfig(block_size=9, vocab_size=10, n_layer=2, n_head=2, n_embd=8)
    gpt = GPT(config).double()

    def score(tokens, mask):
        return dpo.response_logps(gpt(tokens), tokens, mask)

    each = [score(*layouts("right", [text], len(text[1]), 0)) for text in TEXTS]
    alone = torch.cat(each)
    for pad_id in (0, 9):
        padded = score(*layouts("right", TEXTS, 9, pad_id))
        assert_same(padded, alone, 1e-6, what="log pi, padded on the right")
    padded = score(*layouts("left", TEXTS, 9, 0))
    assert ((padded - alone).abs() > 1e-4).all(), (
        "padding on the left changes nothing here: then claim 44 is true as it was first written")


# ---- The shortcut, and pairs

@grades("sequence_logps")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_head_on_response_positions_alone_gives_the_same(dtype, tolerance):
    """Masks of several lengths, one of them empty. The shortcut is compared with one token at a
    time, and its gradient with that of the full logits."""
    config = GPTConfig(block_size=9, vocab_size=13, n_layer=1, n_head=2, n_embd=8)
    gpt = GPT(config).to(dtype)
    tokens, position = torch.randint(13, (4, 9)), torch.arange(9)
    start, stop = torch.tensor([1, 3, 5, 4])[:, None], torch.tensor([9, 6, 5, 8])[:, None]
    mask = (position >= start) & (position < stop)
    short = model.sequence_logps(gpt, tokens, mask)
    logits = gpt(tokens)
    mistakes = response_mistakes(logits.detach(), tokens, mask)
    assert_same(short.detach(), by_hand(logits.detach(), tokens, mask).to(dtype), tolerance,
                {k: v.to(dtype) for k, v in mistakes.items()}, what="log pi(y|x)")

    logps = torch.log_softmax(logits[:, :-1], -1).gather(2, tokens[:, 1:, None]).squeeze(2)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=dtype)
    plain = ((logps * mask[:, 1:]).sum(-1) * weights).sum()
    params = list(gpt.parameters())
    got = torch.autograd.grad((short * weights).sum(), params)
    for a, b in zip(got, torch.autograd.grad(plain, params), strict=True):
        assert_same(a, b, tolerance * 10, what="the gradient of log pi(y|x)")


class Heavy(torch.nn.Module):
    """A model in half precision. It notes the shapes that its head is asked for."""

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
    """The head sees one state for each response token, the state before it, and no other state.

    Half-precision logits are scored in float32 (1e-4 on a sum of 4), and the result is float32.
    """
    heavy, tokens = Heavy(dtype), torch.randint(30, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    logps = model.sequence_logps(heavy, tokens, mask)
    assert heavy.asked == [(4, 8)], (
        f"the head saw states of the shapes {heavy.asked}; wanted (4, 8), once: the 4 positions "
        "that predict a response token")
    assert logps.dtype == torch.float32, (
        f"the result is {logps.dtype}: log_softmax was taken in half precision")
    want = by_hand(heavy.head(heavy.states).double(), tokens, mask).float()
    assert_same(logps, want, 1e-4, what="log pi(y|x)")


@grades("pair_logps")
def test_pair_logps_splits_chosen_from_rejected(tiny):
    """The first B rows are the chosen responses, the last B the rejected ones. The values are
    computed by hand (1e-12), for a GPT and for a bare module."""
    policy, batch = tiny
    tokens, mask = batch["tokens"], batch["response_mask"]
    logits = policy(tokens).detach()
    want, mistakes = by_hand(logits, tokens, mask), response_mistakes(logits, tokens, mask)
    chosen, rejected = slice(0, 3), slice(3, 6)
    even, odd = slice(0, 6, 2), slice(1, 6, 2)
    for module in (policy, Bare(policy)):
        pair = dpo.pair_logps(module, batch)
        assert pair is not None and len(pair) == 2, (
            "wanted two results, the chosen log-probabilities and the rejected ones")
        for got, rows, other, alternate, name in ((pair[0], chosen, rejected, even, "chosen"),
                                                  (pair[1], rejected, chosen, odd, "rejected")):
            of_pairs = {
                "chosen and rejected are swapped. The chosen rows come first": want[other],
                "every other row was taken. The batch is all chosen, then all rejected":
                    want[alternate],
            }
            of_responses = {k: v[rows] for k, v in mistakes.items()}
            assert_same(got.detach(), want[rows], 1e-12, of_pairs | of_responses,
                        what=f"the {name} log-probabilities")
            assert got.requires_grad, (
                f"the {name} log-probabilities are cut off from the policy's parameters")


@grades("pair_logps")
def test_pair_logps_run_the_model_once(tiny):
    """One forward pass for both halves takes half the time. With dropout it also is the same
    network for both."""
    policy, batch = tiny
    calls = []
    policy.wte.register_forward_hook(lambda *_: calls.append(1))
    dpo.pair_logps(policy, batch)
    assert len(calls) == 1, f"the model was run {len(calls)} times; wanted once"


def test_eight_microbatches_are_one_batch_of_eight():
    """Claim 46. The gradient of the mean over eight pairs is the mean of the gradients of single
    pairs, to 1e-6 in float32.

    Two processes would average the same sum. (How the trainer accumulates is shown in
    test_eight_parts_of_one_are_one_batch_of_eight.)
    """
    gpt = GPT(GPTConfig(block_size=9, vocab_size=13, n_layer=1, n_head=2, n_embd=8))
    tokens, ref = torch.randint(13, (16, 9)), torch.randn(2, 8) - 15
    mask = torch.arange(9)[None] >= torch.randint(2, 6, (16, 1))

    def gradient(pairs):
        rows = torch.cat([pairs, pairs + 8])
        batch = {"tokens": tokens[rows], "response_mask": mask[rows]}
        chosen, rejected = dpo.pair_logps(gpt, batch)
        loss = dpo.dpo_loss(chosen, rejected, ref[0, pairs], ref[1, pairs], beta=0.5)[0].mean()
        grads = torch.autograd.grad(loss, list(gpt.parameters()))
        return torch.cat([g.flatten() for g in grads])

    whole = gradient(torch.arange(8))
    parts = [gradient(torch.tensor([i])) for i in range(8)]
    assert_same(sum(parts) / 8, whole, 1e-6,
                {"the parts are summed; wanted their mean": 8 * whole},
                what="the accumulated gradient")
    assert whole.abs().max() > 1e-3, "the gradient is zero: this comparison shows nothing"
    uneven = gradient(torch.arange(5)) * 5 / 8 + gradient(torch.arange(5, 8)) * 3 / 8
    assert_same(uneven, whole, 1e-6,
                what="the gradient of parts of 5 and 3 pairs, weighted by their size,")
