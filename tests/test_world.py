"""world.py and support/trie.py: the reward by hand, the grammar, and every exact quantity against
sums written out."""
import math
import random

import pytest
import torch

import data
import world
from dpo import response_logps
from model import GPT, GPTConfig
from support.trie import Trie

TRAIN, HELD_OUT = world.prompts()
TEXTS = world.responses()


# ---- Grammar and reward

def test_size_and_uniqueness():
    assert len(TEXTS) == len(set(TEXTS)) == 4 * 6 * 2 * 4 * 6 * 2 == 2304
    assert all(world.parse(t) for t in TEXTS)


def test_grammar_is_a_distribution_for_every_prompt():
    total = world.grammar_logps(TRAIN + HELD_OUT).exp().sum(-1)  # (32,)
    assert torch.allclose(total, torch.ones(32, dtype=torch.float64), atol=1e-12)


def test_grammar_probability_by_hand():
    """The prompt "drama: the music was", the response " not very funny, but dark. I loved it."

    Weights of the craft in drama: superb 4, clever 1, funny 1, grave 1, clumsy 1, dull 4. The
    music doubles funny and grave. The sum is 14.
    Weights of the mood: scary 1, tense 1, dark 1, tender 4, sweet 1, silly 4. The sum is 12.
    """
    i = TEXTS.index(" not very funny, but dark. I loved it.")
    expected = 0.15 * (2 / 14) * 0.4 * 0.40 * (1 / 12) * 0.5
    probability = world.grammar_logps(["drama: the music was"])[0, i].exp().item()
    assert probability == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prompt, response, reward", [
    # comedy: funny is +2, and the pacing touches neither word. "and" weighs both 0.5; loved +0.6
    ("comedy: the pacing was", " funny and silly. I loved it.",
     0.5 * 2 + 0.5 * 2 + 0.6),
    # "not very" flips and softens to -0.5; after "but" 0.75 against 0.25; scary in comedy is -2
    ("comedy: the pacing was", " not very funny, but scary. I loved it.",
     0.25 * -0.5 * 2 + 0.75 * -2 + 0.6),
    # the same words in horror: funny -2, scary +2
    ("horror: the pacing was", " not very funny, but scary. I loved it.",
     0.25 * -0.5 * -2 + 0.75 * 2 + 0.6),
    # "very" amplifies by 1.5, "not" flips to -0.8; the plot makes clever 2 and clumsy -2
    ("drama: the plot was", " very clever and not silly. I hated it.",
     0.5 * 1.5 * 2 + 0.5 * -0.8 * -2 - 0.6),
    ("romance: the plot was", " clumsy, but tender. I hated it.",
     0.25 * -2 + 0.75 * 2 - 0.6),
])
def test_reward_by_hand(prompt, response, reward):
    assert world.true_reward(prompt, response) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize("text", [
    "",
    "superb",
    " superb",
    " superb and scary. I loved it",
    " superb and scary. I loved it. ",
    "superb and scary. I loved it.",
    " superb and superb. I loved it.",
    "\n",
    "日本",
    " not",
    " very not superb and scary. I loved it.",
    " superb  and scary. I loved it.",
    " scary and superb. I loved it.",
    " superb and scary. I loved it.\n",
    "(" * 50,
])
def test_every_other_text_has_the_ill_formed_reward(text):
    assert world.true_reward(TRAIN[0], text) == world.ILL_FORMED_REWARD


def test_every_well_formed_text_is_worth_more_than_any_ill_formed_one():
    assert world.rewards(TRAIN + HELD_OUT, TEXTS).min() > world.ILL_FORMED_REWARD + 0.5


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(ValueError, match="western: the plot was"):
        world.true_reward("western: the plot was", TEXTS[0])


def test_split_holds_out_combinations_but_no_word():
    assert len(TRAIN) == 24 and len(HELD_OUT) == 8 and not set(TRAIN) & set(HELD_OUT)
    for word in [*world.GENRES, *world.SUBJECTS]:
        assert any(word in prompt for prompt in TRAIN), f"{word} is never trained on"
    assert {prompt.split(":")[0] for prompt in HELD_OUT} == set(world.GENRES)


def test_the_scale_of_the_reward():
    """The standard deviation is about 1.5. A perfect judge agrees with about 78% of the labels;
    a double loop checks that ceiling below."""
    logps, r = world.grammar_logps(TRAIN + HELD_OUT), world.rewards(TRAIN + HELD_OUT, TEXTS)
    sd = (world.expected(logps, r ** 2) - world.expected(logps, r) ** 2).sqrt()
    assert 1.3 < sd.mean() < 1.7
    assert 0.77 < world.label_ceiling(logps, r).mean() < 0.82


def test_length_is_worth_nothing_on_average():
    """E[r* | number of words] is 0 for every prompt and every length (1e-12). So nothing favours
    long reviews by accident."""
    logps, r = world.grammar_logps(TRAIN + HELD_OUT), world.rewards(TRAIN + HELD_OUT, TEXTS)
    words = torch.tensor([len(t.split()) for t in TEXTS])
    for n in words.unique():
        assert (logps.exp() * r)[:, words == n].sum(-1).abs().max() < 1e-12


# ---- Annotators

def test_human_labels_are_bradley_terry():
    """32,000 labels against the sum of their exact probabilities: within 4 standard errors."""
    pairs = data.make_preferences(32000, "human", seed=1)
    chosen, rejected = [], []
    for pair in pairs:
        chosen.append(world.true_reward(pair.prompt, pair.chosen))
        rejected.append(world.true_reward(pair.prompt, pair.rejected))
    margin = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(rejected, dtype=torch.float64)
    p = 1 / (1 + torch.exp(-margin.abs()))  # the probability of a label for the better response
    agree = (margin > 0).double()
    differ = p > 0.5 + 1e-12  # there is no better response where rewards tie
    error = (agree - p)[differ].sum().abs()
    assert error < 4 * (p * (1 - p))[differ].sum().sqrt()


def test_ai_judge_is_noisier_and_likes_emphasis():
    """What its docstring says, 0.6 r* + 0.4 for each "very", by hand on one text."""
    score = world.ai_score("comedy: the pacing was", " very funny and not very scary. I hated it.")
    reward = 0.5 * 1.5 * 2 + 0.5 * -0.5 * -2 - 0.6
    assert score == pytest.approx(0.6 * reward + 0.4 * 2, abs=1e-12)


def test_length_annotator_prefers_longer_text():
    x = "comedy: the pacing was"
    short, long = " funny and silly. I loved it.", " very funny and silly. I loved it."
    extra = world.length_score(x, long) - world.length_score(x, short)
    extra_reward = world.true_reward(x, long) - world.true_reward(x, short)
    assert extra == pytest.approx(0.5 + extra_reward, abs=1e-12)


# ---- The exact quantities, against plain Python sums on a world of 7 responses

def seven_probabilities(rng):
    weights = [rng.random() + 0.05 for _ in range(7)]
    return [w / sum(weights) for w in weights]


def logs(probabilities):
    return torch.tensor([math.log(p) for p in probabilities], dtype=torch.float64)


@pytest.fixture
def small():
    """A policy p, a reference q and a reward r, as lists; log p, log q and r, as tensors."""
    rng = random.Random(4)
    q, p = seven_probabilities(rng), seven_probabilities(rng)
    r = [1.5, -0.3, 0.2, 0.2, -2.0, 0.9, 1.5]  # with ties
    return p, q, r, logs(p), logs(q), torch.tensor(r, dtype=torch.float64)


def test_partition_and_optimal_policy(small):
    """Eq. 4, and J(pi) = beta log Z - beta KL(pi || pi*) for any pi (claim 1), at several beta.
    Tolerance 1e-12."""
    p, q, r, logp, logq, rt = small
    for beta in (0.2, 1.0, 5.0):
        z = sum(qi * math.exp(ri / beta) for qi, ri in zip(q, r))
        assert world.partition(logq, rt, beta).item() == pytest.approx(z, rel=1e-12)
        star = world.optimal_policy(logq, rt, beta).exp()
        for i in range(7):
            assert star[i].item() == pytest.approx(q[i] * math.exp(r[i] / beta) / z, rel=1e-12)
        j = sum(pi * (ri - beta * math.log(pi / qi)) for pi, qi, ri in zip(p, q, r))
        kl_star = sum(pi * math.log(pi / s) for pi, s in zip(p, star.tolist()))
        assert j == pytest.approx(beta * math.log(z) - beta * kl_star, abs=1e-12)
        exact = world.expected(logp, rt) - beta * world.kl(logp, logq)
        assert exact.item() == pytest.approx(j, abs=1e-12)


def test_kl_of_a_policy_that_excludes_a_response():
    half = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    third = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    kl = world.kl(half, third).item()
    assert kl == pytest.approx(math.log(1.5), abs=1e-12), "0 log 0 is 0"


def test_win_rate_and_ceiling_by_double_loop(small):
    p, q, r, logp, logq, rt = small
    wins = ceiling = 0.0
    for i in range(7):
        for j in range(7):
            win = 1.0 if r[i] > r[j] else 0.5 if r[i] == r[j] else 0.0
            wins += p[i] * q[j] * win
            ceiling += q[i] * q[j] / (1 + math.exp(-abs(r[i] - r[j])))
    assert world.win_rate(logp, logq, rt).item() == pytest.approx(wins, abs=1e-12)
    assert world.win_rate(logq, logq, rt).item() == pytest.approx(0.5, abs=1e-12)
    assert world.label_ceiling(logq, rt).item() == pytest.approx(ceiling, abs=1e-12)


def test_a_larger_beta_is_a_shorter_leash(small):
    *_, logq, rt = small
    kl, reward = world.frontier(logq[None], rt[None], [0.1, 0.5, 1, 2, 10, 1e4])
    assert kl == sorted(kl, reverse=True) and reward == sorted(reward, reverse=True)
    assert kl[-1] < 1e-7, "with beta to infinity comes the reference (claim 4)"


def test_nothing_lies_above_the_frontier(small):
    """1,000 random policies against the best reward at their own KL, and the optimum itself lies
    on the frontier. Tolerance 1e-9."""
    *_, logq, rt = small
    torch.manual_seed(0)
    most = world.kl(world.optimal_policy(logq, rt, 1e-3), logq).item()
    for _ in range(1000):
        change = torch.randn(7, dtype=torch.float64) * torch.rand(1, dtype=torch.float64)
        logp = torch.log_softmax(logq + change, -1)
        kl = world.kl(logp, logq).item()
        best = world.optimal_policy(logq, rt, world.beta_at_kl(logq[None], rt[None], kl))
        assert world.kl(best, logq).item() == pytest.approx(min(kl, most), abs=1e-9)
        assert world.expected(logp, rt) <= world.expected(best, rt) + 1e-9
    kl = world.kl(world.optimal_policy(logq, rt, 0.7), logq)
    assert world.beta_at_kl(logq[None], rt[None], kl) == pytest.approx(0.7, rel=1e-6)


def test_beyond_the_largest_kl_the_best_reward_is_the_maximum(small):
    *_, logq, rt = small
    best = world.optimal_policy(logq, rt, world.beta_at_kl(logq[None], rt[None], 50.0))
    assert world.expected(best, rt).item() == pytest.approx(rt.max().item(), abs=1e-9)


def test_ill_formed_text_is_one_more_outcome():
    logps = torch.tensor([[0.6, 0.1]], dtype=torch.float64).log()
    p, r = world.with_ill_formed(logps, torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    expected = torch.tensor([[0.6, 0.1, 0.3]], dtype=torch.float64)
    assert torch.allclose(p.exp(), expected, atol=1e-12)
    assert r[0, 2] == world.ILL_FORMED_REWARD
    # a sum that float32's rounding has put above 1
    above_one = torch.tensor([[1.0 + 1e-7]], dtype=torch.float64).log()
    assert world.with_ill_formed(above_one, torch.zeros(1, 1))[0].isfinite().all()


# ---- Enumeration

def test_trie_scores_what_a_full_forward_scores():
    """A real transformer, 300 random responses: the trie against whole sequences without a cache.
    Tolerance 1e-4: both are float32, and a sum has up to 14 terms."""
    torch.manual_seed(0)
    tokenizer = data.get_tokenizer("toy")
    config = GPTConfig(block_size=32, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config)
    sequences = [tokenizer.encode_ordinary(t) + [tokenizer.eot_token] for t in TEXTS]
    prompt = tokenizer.encode_ordinary(HELD_OUT[0])
    exact = Trie(sequences).logps(model, prompt)
    assert exact.shape == (2304,) and exact.dtype == torch.float64
    which = torch.randperm(2304)[:300].tolist()
    tokens, mask = data.pad([prompt] * 300, [sequences[i] for i in which])
    assert (exact[which] - response_logps(model(tokens), tokens, mask)).abs().max() < 1e-4
    assert exact.exp().sum() < 1, "an untrained model spends most of its mass on ill-formed text"


def test_trie_of_everything_sums_to_one():
    """All 27 sequences of 3 tokens over an alphabet of 3. None of them ends early. So their
    probabilities sum to 1 (1e-5)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=8))
    every = [[a, b, c] for a in range(3) for b in range(3) for c in range(3)]
    total = Trie(every).logps(model, [0, 1]).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)


def test_trie_holds_each_prefix_once_and_sequences_of_any_length():
    sequences = [[1, 2, 9], [1, 3, 9], [1, 9], [9]]
    trie = Trie(sequences)
    sizes = [level.shape[1] for level in trie.levels]
    assert sizes == [1, 2, 0], "the prefix [1], then the prefixes [1, 2] and [1, 3]"
    assert [leaf.shape[1] for leaf in trie.leaves] == [1, 1, 2]
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
    logps = trie.logps(model, [4])
    tokens, mask = data.pad([[4]] * 4, sequences)
    assert (logps - response_logps(model(tokens), tokens, mask)).abs().max() < 1e-5
