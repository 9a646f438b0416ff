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
from tools import Bare, Mistake, assert_refused, assert_same, grades, masked_texts, vector


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
    sums, length = [], tokens.size(1)
    for b in range(len(tokens)):
        scored = [t for t in range(1, length) if t + shift < length and mask[b, t + shift]]
        sums.append(scored_by_hand(logits[b].tolist(), tokens[b].tolist(), scored))
    return vector(*sums)


def gather(values, tokens):
    """values (B,S,V) at the tokens (B,S). (B, S)"""
    return values.gather(2, tokens.unsqueeze(2)).squeeze(2)


def token_mistakes(logits, tokens):
    """What is often computed instead of log p(token t+1 | tokens up to t), and what it gives."""
    logps, first, later = torch.log_softmax(logits, -1), logits[:, :-1], tokens[:, 1:]
    right = gather(logps[:, :-1], later)
    flat = first.reshape(-1, logits.size(-1))
    return {
        "nothing is shifted. Position t predicts token t+1, so logits[:, :-1] belong to "
        "tokens[:, 1:]": gather(logps[:, :-1], tokens[:, :-1]),
        "nothing is shifted, and the last prediction is still there. Position t predicts token "
        "t+1, so there are T-1 predictions": gather(logps, tokens),
        "the shift goes in the wrong direction. Position t predicts token t+1, so logits[:, :-1] "
        "belong to tokens[:, 1:]": gather(logps[:, 1:], tokens[:, :-1]),
        "the logits at t have already seen token t. logits[:, :-1] belong to tokens[:, 1:]":
            gather(logps[:, 1:], later),
        "these are raw logits, not normalised. Take log_softmax": gather(first, later),
        "the softmax is over time. It is over the vocabulary, the last axis: dim=-1":
            [gather(torch.log_softmax(logits, 1)[:, :-1], later),
             gather(torch.log_softmax(first, 1), later)],
        "the softmax is over the batch. It is over the vocabulary, the last axis: dim=-1":
            [gather(torch.log_softmax(first, 0), later),
             gather(torch.log_softmax(flat, 0).view(first.shape), later)],
        "there are two softmaxes, one in the other. log_softmax takes the logits":
            gather(torch.log_softmax(first.softmax(-1), -1), later),
        "each logit has its own sigmoid; wanted a softmax over the vocabulary":
            [gather(torch.nn.functional.logsigmoid(first), later)],
        "this is the likeliest token's; wanted that of the token in the text":
            logps[:, :-1].amax(-1),
        "token 0 gets 0. It is a token like any other: the mask says what is padding":
            torch.where(later == 0, 0.0, right),
        "rows are mixed: the values are reshaped in the wrong order":
            [right.t().reshape(right.shape), right.reshape(right.size(1), -1).t()],
        "the last prediction is left out": torch.where(
            torch.arange(right.size(1)) < right.size(1) - 1, right, 0.0),
        "these are probabilities; wanted their logarithms": right.exp(),
        "this is the negative log-likelihood. The sign is flipped": -right,
        "these are logarithms to base 2; wanted nats": right / math.log(2),
    }


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
    mistakes = {
        "you averaged over tokens; Eq. 7 sums": right / length,
        "you divided by the number of all tokens; Eq. 7 sums": right / (tokens.size(1) - 1),
        "you averaged over the batch; wanted (B,)": right.mean(),
        "you summed over the batch; wanted (B,)": right.sum(),
        "the prompt is counted. The mask is true on the response alone":
            by_hand(logits, tokens, prompt_too),
        "the prompt is counted in the first half of the batch. Is the mask built for half of it?":
            by_hand(logits, tokens, half),
        "prompt and padding are counted. The mask is not used":
            by_hand(logits, tokens, everything),
        "the padding is counted. The mask is true on the response alone":
            by_hand(logits, tokens, mask.cumsum(1) > 0),
        "the mask is inverted. This is the log-probability of prompt and padding":
            by_hand(logits, tokens, ~mask),
        "this is the log-probability of the prompt; wanted that of the response":
            by_hand(logits, tokens, prompt_too & ~mask),
        "the mask is off by one. Entry t of token_logps is about token t+1, so mask[:, 1:] belongs "
        "to it": [by_hand(logits, tokens, mask, shift) for shift in (-1, 1)],
        "the last response token, EOS, is left out. The model would never learn to stop":
            by_hand(logits, tokens, mask & ~last),
        "the first response token is left out. The last logits of the prompt predict it":
            by_hand(logits, tokens, mask & ~first),
        "the first and the last response token are left out":
            by_hand(logits, tokens, mask & ~first & ~last),
        "the last column is left out, and with it EOS of the longest rows":
            by_hand(logits, tokens, mask & (torch.arange(mask.size(1)) < mask.size(1) - 1)),
        "token 1 is never scored. Is something shifted twice?":
            by_hand(logits, tokens, mask & (torch.arange(mask.size(1)) != 1)),
        "every token except 0 is counted. The mask says what is the response, not the ids":
            by_hand(logits, tokens, tokens != 0),
        "the logits are multiplied by the mask. Select log-probabilities with it":
            [by_hand(logits * mask[:, :, None], tokens, mask),
             by_hand(logits * mask.roll(-1, 1)[:, :, None], tokens, mask)],
    }
    def summed(values):
        return (torch.where(mask, values[:, :mask.size(1)], 0.0) if values.shape == mask.shape
                else torch.where(mask[:, 1:], values, 0.0)).sum(-1)

    mistakes |= with_each(token_mistakes(logits, tokens), summed)
    selected = torch.log_softmax(logits[:, :-1][mask[:, 1:]], 0)  # (N, V)
    over_positions = torch.zeros_like(logits[:, :-1])
    over_positions[mask[:, 1:]] = selected
    mistakes["the softmax is over the positions. It is over the vocabulary, the last axis"] = (
        summed(gather(over_positions, tokens[:, 1:])))
    mistakes["this is a product of probabilities; wanted the sum of their logarithms"] = right.exp()
    return mistakes


def with_each(mistakes, change):
    """The same mistakes, with change(value) for each value of a whole batch."""
    found = {}
    for mistake, values in mistakes.items():
        several = values if isinstance(values, list) else [values]
        found[mistake] = [change(value) for value in several if value.dim()]
    return found


def some_texts():
    """(logits, tokens, mask): 4 texts of 9 tokens over a vocabulary of 11. The prompts and the
    responses have several lengths. There is padding, and no row is empty."""
    logits, tokens = 2 * torch.randn(4, 9, 11).double(), torch.randint(11, (4, 9))
    position = torch.arange(9)
    start, stop = torch.tensor([2, 4, 3, 1])[:, None], torch.tensor([8, 7, 9, 5])[:, None]
    return logits, tokens, (position >= start) & (position < stop)


def check_precision(got, want, tolerance, what):
    """The result for half-precision logits. Half precision is too coarse for it. float32 will do,
    and float64 too."""
    if got.dtype not in (torch.float32, torch.float64):
        raise Mistake(f"{what}: half precision is kept, the result is {got.dtype}. Turn the logits "
                      "into float32 before the softmax")
    if got.shape == want.shape:
        off = (got.detach().double() - want).abs().max() / want.abs().max()
        if tolerance < off < 1e-2:
            raise Mistake(f"{what}: it is right to half precision only. Turn the logits into "
                          "float32 before the softmax, and sum in float32")
    assert_same(got, want, tolerance, what=f"{what} of half-precision logits")


def check_unlikely(got, want, what):
    """A result for [a token with log p = -200, likely tokens]."""
    if got.shape == want.shape and (got - want)[1:].abs().max() < 1e-3:
        if got[0] == -math.inf:
            raise Mistake(f"{what}: a very unlikely token gets -inf; wanted -200. The log of a "
                          "softmax underflows. log_softmax does not")
        if got[0] > want[0] + 10:
            raise Mistake(f"{what}: a very unlikely token gets {got[0]:.1f}; wanted -200. Is a "
                          "probability clipped, or something added to it, before the log? Take "
                          "log_softmax")
    assert_same(got, want, 1e-6, what=f"{what} of a very unlikely token and likely ones")


def unlikely_text():
    """(logits, tokens), float32: the first prediction gives its token a log-probability of -200,
    the two others are ordinary."""
    logits = torch.tensor([[[200.0, 0, 0], [1, 2, 0], [0, 1, 0.5], [0, 0, 0]]])
    return logits, torch.tensor([[0, 1, 2, 1]])


def check_trained(result, logits, what):
    """The result carries a gradient to the logits."""
    if not result.requires_grad or torch.autograd.grad(
            result.sum(), logits, allow_unused=True)[0] is None:
        raise Mistake(f"{what}: no gradient flows to the logits, so nothing could be trained. Is "
                      "there a detach, a no_grad or an item() too many?")


# ---- One token at a time

@grades("token_logps")
def test_token_logps_of_some_texts():
    """Entry t is log p(token t+1 | tokens up to t). 4 texts, compared with one softmax at a time,
    to 1e-12."""
    logits, tokens, _ = some_texts()
    assert_same(dpo.token_logps(logits, tokens), each_by_hand(logits, tokens), 1e-12,
                token_mistakes(logits, tokens), what="token_logps")


def each_by_hand(logits, tokens):
    """`scored_by_hand` for every token: (B, T-1)."""
    rows = []
    for b in range(len(tokens)):
        plain_logits, plain_tokens = logits[b].tolist(), tokens[b].tolist()
        each = [scored_by_hand(plain_logits, plain_tokens, [t]) for t in range(1, tokens.size(1))]
        rows.append(vector(*each))
    return torch.stack(rows)


@grades("token_logps")
def test_very_unlikely_tokens_have_finite_log_probabilities():
    """log p = -200 is a number like any other. The log of softmax underflows to -inf, and the log
    of clipped probabilities stops early. log_softmax does neither. In float32, to 1e-6."""
    logits, tokens = unlikely_text()
    want = torch.stack([torch.log_softmax(logits[0, t], -1)[tokens[0, t + 1]] for t in range(3)])
    got = dpo.token_logps(logits, tokens)
    check_unlikely(got[0] if got.dim() == 2 else got, want, "token_logps")


@grades("token_logps")
def test_token_logps_can_be_trained():
    """The gradient flows to the logits."""
    logits, tokens, _ = some_texts()
    logits.requires_grad_()
    check_trained(dpo.token_logps(logits, tokens), logits, "token_logps")


@grades("token_logps")
@given(masked_texts())
def test_token_logps_are_log_softmax_shifted_by_one(text):
    """For every text, entry t is log p(token t+1 | tokens up to t), to 1e-12."""
    logits, tokens, _ = text
    assert_same(dpo.token_logps(logits, tokens), each_by_hand(logits, tokens), 1e-12,
                what="token_logps")


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
    want = gather(torch.log_softmax(logits.double(), -1)[:, :-1], tokens[:, 1:])
    check_precision(dpo.token_logps(logits, tokens), want, 1e-5, "token_logps")


def test_half_precision_becomes_float32():
    """The project's own result is no larger than it must be."""
    logits, tokens = torch.zeros(1, 3, 4).half(), torch.zeros(1, 3, dtype=torch.long)
    assert dpo.token_logps(logits, tokens).dtype == torch.float32
    assert dpo.response_logps(logits, tokens, torch.ones(1, 3)).dtype == torch.float32


@grades("token_logps")
def test_float64_stays_float64():
    """Gradient checks need float64. In float32, differences of 1e-5 are lost in rounding."""
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logps = dpo.token_logps(logits, torch.zeros(1, 3, dtype=torch.long))
    assert logps.dtype == torch.float64, f"the result is {logps.dtype}; wanted float64"


OTHER_TEXTS = ((2, 3, 4), (2, 5, 4), (1, 4, 4), (3, 4, 4), (3, 3, 4))


@grades("token_logps", guard="logits of another text")
@pytest.mark.parametrize("shape", OTHER_TEXTS)
def test_logits_of_another_text_are_refused(shape):
    """For tokens (2,4). A ValueError is raised."""
    tokens = torch.zeros(2, 4, dtype=torch.long)
    assert_refused(dpo.token_logps, torch.zeros(shape), tokens)


@pytest.mark.parametrize("shape", OTHER_TEXTS)
def test_the_refusal_of_logits_shows_both_shapes(shape):
    """The message of the project's own ValueError."""
    tokens = torch.zeros(2, 4, dtype=torch.long)
    message = assert_refused(dpo.token_logps, torch.zeros(shape), tokens)
    assert str(shape) in message and "(2, 4)" in message


# ---- Whole responses

@grades("response_logps")
def test_response_logps_of_some_texts():
    """The sum of log pi(y_t | x, y_<t) over the response's tokens. 4 texts, compared with
    plain floats, one token at a time, to 1e-11."""
    logits, tokens, mask = some_texts()
    want = by_hand(logits, tokens, mask)
    assert_same(dpo.response_logps(logits, tokens, mask), want, 1e-11,
                response_mistakes(logits, tokens, mask), what="log pi(y|x)")


@grades("response_logps")
def test_average_of_some_texts():
    """average=True, for IPO as its authors run it: the sum is divided by the number of response
    tokens, to 1e-11."""
    logits, tokens, mask = some_texts()
    total, n = by_hand(logits, tokens, mask), mask.sum(-1)
    assert_same(dpo.response_logps(logits, tokens, mask, average=True), total / n, 1e-11, {
        "average is ignored. This is the sum": total,
        "it is divided by the number of all tokens, prompt and padding included":
            [total / tokens.size(1), total / (tokens.size(1) - 1)],
        "it is divided by the number of response tokens minus 1": total / (n - 1),
        "it is divided by one number for all rows. Each row has its own length":
            [total / n.sum(), total / n.double().mean(), total / n.max()],
    }, what="the average")


@grades("response_logps")
def test_what_lies_outside_the_response_may_be_infinite():
    """A log-probability of -inf outside the response does no harm. A product with the mask would
    give nan, because -inf x 0 is nan. So the mask must select."""
    logits, tokens, mask = some_texts()
    logits[torch.arange(4), 0, tokens[:, 1]] = -math.inf  # position 0 predicts token 1
    mask[:, 1] = False
    got = dpo.response_logps(logits, tokens, mask)
    if got.isnan().all():
        raise Mistake("log pi(y|x) is nan, because -inf x 0 is nan. Select with the mask, for "
                      "example with torch.where, and do not multiply by it")
    assert_same(got, by_hand(logits, tokens, mask), 1e-11, what="log pi(y|x)")


@grades("response_logps")
def test_a_row_without_a_response():
    """Its sum is 0, and its average is 0 too: 0/0 is nan, and one nan spoils the whole batch."""
    logits, tokens, mask = some_texts()
    mask[1] = False
    want = by_hand(logits, tokens, mask)
    got = dpo.response_logps(logits, tokens, mask)
    assert_same(got, want, 1e-11, what="log pi(y|x), beside an empty row")
    got = dpo.response_logps(logits, tokens, mask, average=True)
    n = mask.sum(-1)
    assert_same(got, want / n.clamp(min=1), 1e-11, {
        "a row without a response gives 0/0, which is nan. Divide by at least 1": want / n,
    }, what="the average, beside an empty row")


@grades("response_logps")
def test_responses_with_very_unlikely_tokens():
    """A response with a token of log p = -200, and two without, in float32, to 1e-6."""
    logits, tokens = unlikely_text()
    each = torch.stack([torch.log_softmax(logits[0, t], -1)[tokens[0, t + 1]] for t in range(3)])
    mask = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    got = dpo.response_logps(logits.expand(3, -1, -1), tokens.expand(3, -1), mask)
    check_unlikely(got, torch.stack([each[0], each[1] + each[2], each[2]]), "log pi(y|x)")


@grades("response_logps")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_responses_of_half_precision_logits_are_summed_in_float32(dtype):
    """The sum of 200 terms, to 1e-4 of its size. A sum in half precision would be off by several
    units."""
    logits, tokens = (5 * torch.randn(2, 201, 50)).to(dtype), torch.randint(50, (2, 201))
    mask = torch.arange(201).expand(2, -1) > 0
    got = dpo.response_logps(logits, tokens, mask)
    check_precision(got, by_hand(logits.double(), tokens, mask), 1e-4, "log pi(y|x)")


@grades("response_logps")
def test_response_logps_can_be_trained():
    """The gradient flows to the logits."""
    logits, tokens, mask = some_texts()
    logits.requires_grad_()
    check_trained(dpo.response_logps(logits, tokens, mask), logits, "log pi(y|x)")


@grades("response_logps")
@given(masked_texts())
def test_response_logps_are_the_log_of_the_product_of_probabilities(text):
    """Claim 44. The sum runs over the response's tokens, for masks of any form.

    It is compared with plain floats, one token at a time, to 1e-11. The empty mask has the sum 0.
    """
    logits, tokens, mask = text
    assert_same(dpo.response_logps(logits, tokens, mask), by_hand(logits, tokens, mask), 1e-11,
                what="log pi(y|x)")


@grades("response_logps")
def test_uniform_logits_give_minus_n_ln_v():
    """Claim 44. A response of n tokens has a sum of n terms -ln V, to 1e-6. A mean would be -ln V
    for every n, which is the objective of another paper."""
    mask = torch.tensor([[False, False, True, True, True], [False, True, False, False, False]])
    logps = dpo.response_logps(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long), mask)
    v = math.log(7)
    assert_same(logps, torch.tensor([-3 * v, -v]), 1e-6,
                what="log pi of 3 tokens, and of 1 token, from a vocabulary of 7")


@grades("response_logps")
@given(masked_texts())
def test_average_divides_by_the_number_of_response_tokens(text):
    """average=True for masks of any form, to 1e-11. A row without a response gives 0, not nan."""
    logits, tokens, mask = text
    total, n = by_hand(logits, tokens, mask), mask[:, 1:].sum(-1)
    assert_same(dpo.response_logps(logits, tokens, mask, average=True), total / n.clamp(min=1),
                1e-11, what="the average")


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
                what="what EOS adds")


OTHER_MASKS = ((2, 2), (2, 1), (3,))  # (2,1) would broadcast


@grades("response_logps", guard="a mask of another shape")
@pytest.mark.parametrize("shape", OTHER_MASKS)
def test_a_mask_of_another_shape_is_refused(shape):
    """For tokens (2,3). A ValueError is raised."""
    logits, tokens = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    assert_refused(dpo.response_logps, logits, tokens, torch.ones(shape).bool())


@pytest.mark.parametrize("shape", OTHER_MASKS)
def test_the_refusal_of_a_mask_shows_both_shapes(shape):
    """The message of the project's own ValueError."""
    logits, tokens = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    message = assert_refused(dpo.response_logps, logits, tokens, torch.ones(shape).bool())
    assert str(shape) in message and "(2, 3)" in message


@grades("response_logps")
@pytest.mark.parametrize("average", [False, True])
def test_a_mask_of_zeros_and_ones_will_do(average):
    """Many libraries use masks of integers. They mean the same as masks of booleans."""
    logits, tokens, mask = some_texts()
    got = dpo.response_logps(logits, tokens, mask.long(), average)
    assert torch.equal(got, dpo.response_logps(logits, tokens, mask, average)), (
        "a mask of 0 and 1 gives another result than the same mask of booleans. Begin with "
        "mask.bool()")


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
    assert_same(dpo.response_logps(logits, tokens, mask), torch.tensor(want), 1e-6,
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
                mistakes, what="log pi(y|x)")

    logps = gather(torch.log_softmax(logits[:, :-1], -1), tokens[:, 1:])
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=dtype)
    plain = ((logps * mask[:, 1:]).sum(-1) * weights).sum()
    params = list(gpt.parameters())
    got = [None]
    if short.requires_grad:
        got = torch.autograd.grad((short * weights).sum(), params, allow_unused=True)
    if None in got:
        raise Mistake("log pi(y|x): no gradient flows to some of the model's parameters. Is there "
                      "a detach, a no_grad or an item() too many?")
    for a, b in zip(got, torch.autograd.grad(plain, params), strict=True):
        assert_same(a, b, tolerance * 10, what="the gradient of log pi(y|x)")


class Heavy(torch.nn.Module):
    """A model in one precision. It counts its runs, and the states that its head is asked for."""

    def __init__(self, dtype):
        super().__init__()
        self.states = (3 * torch.randn(30, 8)).to(dtype)  # of each token
        self.weight = torch.randn(30, 8).to(dtype)
        self.runs = self.asked = 0

    def hidden(self, tokens, needed=None):
        self.runs += 1
        return self.states[tokens]

    def head(self, states):
        self.asked += states[..., 0].numel()
        return states @ self.weight.T

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


def heavy_texts():
    """tokens, mask: 2 texts of 6 tokens, with 2 response tokens each."""
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    return torch.randint(30, (2, 6)), mask


@grades("sequence_logps")
def test_the_shortcut_with_very_unlikely_tokens():
    """As for response_logps: in float32, to 1e-6."""
    logits, tokens = unlikely_text()
    heavy = Heavy(torch.float32)
    heavy.states = logits[0, [0, 1, 2]]  # the states of the tokens 0, 1 and 2
    heavy.weight = torch.eye(3)
    tokens, mask = tokens.expand(3, -1), torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]])
    each = torch.stack([torch.log_softmax(logits[0, t], -1)[tokens[0, t + 1]] for t in range(3)])
    got = model.sequence_logps(heavy, tokens, mask.bool())
    check_unlikely(got, torch.stack([each[0], each[1] + each[2], each[2]]), "log pi(y|x)")


@grades("sequence_logps")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_shortcut_scores_half_precision_in_float32(dtype):
    """The result is float32 at least, and right to 1e-4."""
    heavy, (tokens, mask) = Heavy(dtype), heavy_texts()
    want = by_hand(heavy(tokens).double(), tokens, mask)
    check_precision(model.sequence_logps(heavy, tokens, mask), want, 1e-4, "log pi(y|x)")


@grades("sequence_logps", cost=True)
def test_the_shortcut_runs_the_head_where_it_must():
    """The body runs once. The head sees one state for each response token, the state before it, and
    no other state."""
    heavy, (tokens, mask) = Heavy(torch.float32), heavy_texts()
    model.sequence_logps(heavy, tokens, mask)
    assert heavy.runs == 1, f"the body of the model ran {heavy.runs} times, 1 is needed"
    assert heavy.asked == 4, (
        f"the head ran at {heavy.asked} positions, 4 are needed ({heavy.asked / 4:.3g} times)")


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
    two = torch.tensor([0, 1, 3, 4])
    smaller = dpo.pair_logps(policy, {"tokens": tokens[two], "response_mask": mask[two]})
    shapes = [tuple(logps.shape) for logps in smaller]
    if shapes != [(2,), (2,)]:
        raise Mistake(f"for 2 pairs, the results have the shapes {shapes[0]} and {shapes[1]}; "
                      "wanted (2,) and (2,)")
    for module in (policy, Bare(policy)):
        pair = dpo.pair_logps(module, batch)
        assert pair is not None and len(pair) == 2, (
            "wanted two results, the chosen log-probabilities and the rejected ones")
        for got, rows, other, alternate, name in ((pair[0], chosen, rejected, even, "chosen"),
                                                  (pair[1], rejected, chosen, odd, "rejected")):
            of_pairs = {
                "these are those of the other half. The chosen rows come first": want[other],
                "every other row was taken. The batch is all chosen, then all rejected":
                    want[alternate],
            }
            of_responses = with_each(mistakes, lambda value: value[rows])
            assert_same(got.detach(), want[rows], 1e-12, of_pairs | of_responses,
                        what=f"the {name} log-probabilities")
            if not got.requires_grad:
                raise Mistake(f"the {name} log-probabilities are cut off from the policy: no "
                              "gradient can flow. Is there a detach or a no_grad too many?")


@grades("pair_logps", cost=True)
def test_pair_logps_run_the_model_once(tiny):
    """One forward pass for both halves takes half the time. With dropout it also is the same
    network for both."""
    policy, batch = tiny
    calls = []
    policy.wte.register_forward_hook(lambda *_: calls.append(1))
    dpo.pair_logps(policy, batch)
    assert len(calls) == 1, f"the model ran {len(calls)} times, 1 is needed"


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
