"""lab/credit.py: the value of every prefix against plain sums, and against the tree of the token
level. float64, 1e-10 unless stated."""
import math

import pytest
import torch

import world
from lab import credit, tabular
from support.tokenizers import get_tokenizer
from tools import assert_same, vector


def beta_as_text(beta):
    return f"beta={beta}"


each_beta = pytest.mark.parametrize("beta", [0.3, 1.0, 5.0], ids=beta_as_text)


def test_prefixes_by_hand():
    """The first and the third sequence begin with the same token, the first two end alike. A
    sequence that has ended keeps a number of its own."""
    prefix = credit.prefixes([[5, 7, 9], [6, 7, 9], [5, 9]])
    assert prefix.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 2, 2]]


@each_beta
def test_the_values_are_those_of_soft_value_iteration(beta):
    """All 27 texts of a tree. tabular.soft_value_iteration goes backwards, token by token. Here
    each value is one sum over texts. tabular counts the reward as the last token's; here the value
    of a whole text is its reward."""
    ref, reward = tabular.random_tree(3, 3), torch.randn(3, 3, 3, dtype=torch.float64)
    zeros = [torch.zeros_like(level) for level in ref[:2]]
    values, policy = tabular.soft_value_iteration(ref, [*zeros, reward], beta)
    texts = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
    prefix, logps = credit.prefixes(texts.tolist()), tabular.along(ref)[-1].flatten()
    got = credit.values(logps, reward.flatten(), beta, prefix)  # (27, 4)
    wanted = [*values[:3], reward]
    advantages = credit.advantages(logps, reward.flatten(), beta, prefix)  # (27, 3)
    for row, (value, advantage) in zip(texts.tolist(), zip(got, advantages)):
        for t in range(4):
            assert_same(value[t], wanted[t][tuple(row[:t])], 1e-10, what=f"V of {row[:t]}")
        for t in range(3):
            here = tuple(row[:t + 1])
            assert_same(advantage[t], beta * (policy[t] - ref[t])[here], 1e-10,
                        what=f"the advantage of the last token of {here}")


@each_beta
def test_the_values_of_reviews_are_sums_over_those_that_begin_so(beta):
    """Two prompts of the toy world, and 40 prefixes of reviews drawn at random, of any length. The
    oracle compares texts, with str.startswith, and adds up plain floats."""
    prompts, texts = world.prompts()[1][:2], world.responses()
    ref, reward = world.grammar_logps(prompts), world.rewards(prompts, texts)  # (2, N) each
    sequences = credit.toy_sequences()
    prefix, tokenizer = credit.prefixes(sequences), get_tokenizer("toy")
    values = credit.values(ref, reward, beta, prefix)  # (2, N, T+1)
    logps = credit.token_logps(ref, prefix)  # (2, N, T)
    assert values.shape == (2, len(texts), max(map(len, sequences)) + 1)

    def below(x, ids):
        """The mass and the weighted mass of the reviews that begin with these tokens."""
        # A connective is "," and " but", or " and". No word of a review is the beginning of another
        # one, so a text that begins like the prefix has the prefix's tokens.
        start = tokenizer.decode([i for i in ids if i != tokenizer.eot_token])
        here = [k for k, text in enumerate(texts) if text.startswith(start)]
        p = [math.exp(ref[x, k]) for k in here]
        return math.fsum(p), math.fsum(
            q * math.exp(reward[x, k] / beta) for q, k in zip(p, here))

    for n in torch.randint(len(texts), (40,)).tolist():
        ids, x = sequences[n], n % 2
        t = int(torch.randint(len(ids), ()))
        (mass, weighted), (next_mass, _) = below(x, ids[:t]), below(x, ids[:t + 1])
        assert_same(values[x, n, t], vector(beta * math.log(weighted / mass))[0], 1e-10,
                    what=f"V of the first {t} tokens of {texts[n]!r}")
        assert_same(logps[x, n, t], vector(math.log(next_mass / mass))[0], 1e-10,
                    what=f"log ref of token {t} of {texts[n]!r}")


@each_beta
def test_the_advantages_of_a_review_add_up_to_its_reward(beta):
    """A = beta log(pi*/ref) for each token, the sum over a review is r - V(s_0), and behind its end
    nothing is added."""
    prompts = world.prompts()[1][:2]
    ref, reward = world.grammar_logps(prompts), world.rewards(prompts, world.responses())
    sequences = credit.toy_sequences()
    prefix = credit.prefixes(sequences)
    star = world.optimal_policy(ref, reward, beta)  # (2, N)
    advantages = credit.advantages(ref, reward, beta, prefix)  # (2, N, T)
    ratio = credit.token_logps(star, prefix) - credit.token_logps(ref, prefix)  # (2, N, T)
    assert_same(advantages, beta * ratio, 1e-10, {"beta is missing": ratio}, what="A")
    v0 = beta * world.log_partition(ref, reward, beta)[:, None]  # (2, 1)
    assert_same(advantages.sum(-1), reward - v0, 1e-10, what="the sum over the tokens")
    for n in (0, 100, 2303):
        assert (advantages[:, n, len(sequences[n]):] == 0).all(), "there is credit behind the end"


def test_a_small_beta_and_unlikely_responses_stay_finite():
    """exp(r/beta) would overflow at beta = 0.001. There V is nearly the largest reward."""
    prefix = credit.prefixes([[1, 1], [1, 2], [2, 1]])
    ref = torch.log_softmax(vector(0.0, -800.0, 0.0), -1)
    reward = vector(3.0, 8.0, -2.0)
    values = credit.values(ref, reward, 1e-3, prefix)
    assert_same(values[:, 2], reward, 1e-10, what="V of whole responses")
    assert_same(values[0, 1], vector(8.0 - 0.8)[0], 1e-10, what="V of the first token of the best")
    assert values.isfinite().all()
