"""world.py and support/trie.py: the reward by hand, the grammar, and every exact quantity against
sums written out."""
import itertools
import math
import random

import pytest
import torch

import data
import world
from dpo import response_logps
from losses import missing_mass
from model import GPT, GPTConfig
from support.trie import Trie
from tools import assert_same

TRAIN, HELD_OUT = world.prompts()
TEXTS = world.responses()


# ---- Grammar and reward

def test_size_and_uniqueness():
    assert len(TEXTS) == len(set(TEXTS)) == 4 * 6 * 2 * 4 * 6 * 2 == 2304
    assert all(world.parse(t) for t in TEXTS)


def test_grammar_is_a_distribution_for_every_prompt():
    total = world.grammar_logps(TRAIN + HELD_OUT).exp().sum(-1)  # (32,)
    assert torch.allclose(total, torch.ones(32, dtype=torch.float64), atol=1e-12)


# What an adjective is worth in comedy, horror, drama, romance: the craft, then the mood.
CRAFT = {"superb": (2, 2, 2, 2), "clever": (1, 1, 1, 1), "funny": (2, -2, -1, 1),
         "grave": (-2, 2, 1, -1), "clumsy": (-1, -1, -1, -1), "dull": (-2, -2, -2, -2)}
MOOD = {"scary": (-2, 2, -1, -2), "tense": (-1, 1, 1, -1), "dark": (-1, 2, 1, -2),
        "tender": (1, -2, 2, 2), "sweet": (1, -1, -1, 2), "silly": (2, -2, -2, 1)}
# Which adjective is worth 1 more, and which 1 less.
SUBJECTS = {"plot": ("clever", "clumsy"), "pacing": ("superb", "dull"),
            "acting": ("grave", "funny"), "ending": ("superb", "dull"),
            "music": ("grave", "funny"), "dialogue": ("funny", "grave"),
            "opening": ("funny", "grave"), "lighting": ("clever", "clumsy")}
# By what a modifier multiplies, and how likely it is.
MODIFIERS = {"": (1, 0.4), "very": (1.5, 0.25), "not": (-0.8, 0.2), "not very": (-0.5, 0.15)}


def reward_and_probability(prompt, response):
    """Both by reading the words one after the other."""
    genre, subject = prompt.removesuffix(" was").split(": the ")
    column = ["comedy", "horror", "drama", "romance"].index(genre)
    better, worse = SUBJECTS[subject]
    clauses, verdict = response.split(". I ")
    is_contrast = ", but " in clauses
    reward = {"loved it.": 0.6, "hated it.": -0.6}[verdict]
    probability = 0.5 * (0.4 if is_contrast else 0.6)
    shares = (0.25, 0.75) if is_contrast else (0.5, 0.5)
    words = clauses.split(", but" if is_contrast else " and")
    for share, clause, values in zip(shares, words, (CRAFT, MOOD)):
        *modifier, adjective = clause.split()
        scale, chance = MODIFIERS[" ".join(modifier)]
        value = values[adjective][column] + (adjective == better) - (adjective == worse)
        reward += share * scale * value
        weights = {a: v[column] ** 2 * (2 if a in (better, worse) else 1)
                   for a, v in values.items()}
        probability *= chance * weights[adjective] / sum(weights.values())
    return reward, probability


def test_every_reward_and_every_probability_as_specified():
    """r* and the grammar, for all 32 prompts and every 29th response, against the tables above and
    a reader that knows no regular expression (1e-12). Every word is in many of them."""
    prompts, texts = TRAIN + HELD_OUT, TEXTS[::29]
    want = torch.tensor([[reward_and_probability(x, y) for y in texts] for x in prompts],
                        dtype=torch.float64)  # (32, 80, 2)
    assert_same(world.rewards(prompts, texts), want[..., 0], 1e-12, what="r*")
    assert_same(world.grammar_logps(prompts)[:, ::29].exp(), want[..., 1], 1e-12,
                what="the grammar's probability")


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
    """The held-out prompts are these 8. All others are trained on, so every word is."""
    subjects = {"comedy": ("plot", "music"), "horror": ("pacing", "dialogue"),
                "drama": ("acting", "opening"), "romance": ("ending", "lighting")}
    assert HELD_OUT == [f"{g}: the {s} was" for g, pair in subjects.items() for s in pair]
    every = [f"{g}: the {s} was" for g in subjects for s in SUBJECTS]
    assert TRAIN == [prompt for prompt in every if prompt not in HELD_OUT] and len(TRAIN) == 24
    for word in [*subjects, *SUBJECTS]:
        assert any(word in prompt for prompt in TRAIN), f"{word} is never trained on"


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


def test_normalise_divides_each_row_by_its_sum(small):
    """Two rows of weights, of which one sums to 1/2 and one to 3, to 1e-12."""
    p, q, *_, logp, logq, _ = small
    weights = torch.stack([logp - math.log(2), logq + math.log(3)])  # (2, 7)
    want = torch.tensor([p, q], dtype=torch.float64)
    assert_same(world.normalise(weights).exp(), want, 1e-12, what="the policy")


def test_win_rate_and_ceiling_by_double_loop(small):
    """For one prompt and for two, to 1e-12. Equal rewards whose sums were rounded otherwise tie."""
    p, q, r, logp, logq, rt = small

    def wins(p, q, r):
        ranked = [(a > b) + (a == b) / 2 for a in r for b in r]
        return sum(pi * qj * win for (pi, qj), win in zip(itertools.product(p, q), ranked))

    def ceiling(q, r):
        return sum(qi * qj / (1 + math.exp(-abs(a - b)))
                   for qi, a in zip(q, r) for qj, b in zip(q, r))

    assert world.win_rate(logp, logq, rt).item() == pytest.approx(wins(p, q, r), abs=1e-12)
    assert world.win_rate(logq, logq, rt).item() == pytest.approx(0.5, abs=1e-12)
    assert world.label_ceiling(logq, rt).item() == pytest.approx(ceiling(q, r), abs=1e-12)
    both, other = torch.stack([logp, logq]), torch.stack([logq, logp])  # (2, 7)
    rewards, backwards = torch.stack([rt, rt.flip(0)]), r[::-1]
    want = [wins(p, q, r), wins(q, p, backwards)]
    assert world.win_rate(both, other, rewards).tolist() == pytest.approx(want, abs=1e-12)
    want = [ceiling(p, r), ceiling(q, backwards)]
    assert world.label_ceiling(both, rewards).tolist() == pytest.approx(want, abs=1e-12)
    rounded = rt + torch.tensor([0, 0, 3e-10, 0, 0, 0, 0], dtype=torch.float64)
    assert world.win_rate(logp, logq, rounded).item() == pytest.approx(wins(p, q, r), abs=1e-12)


def test_frontier_and_its_beta_are_means_over_prompts(small):
    """Two prompts with the same reference and other rewards, at several beta, against plain sums
    (1e-12). beta_at_kl finds the beta again, from the mean KL (1e-9): from the largest KL or the
    sum it would find another one."""
    _, q, r, _, logq, rt = small
    ref, rewards = torch.stack([logq, logq]), torch.stack([rt, 2 * rt.flip(0)])  # (2, 7)
    for beta in (0.3, 1.0, 5.0):
        kl, best = 0.0, 0.0
        for values in (r, [2 * value for value in r[::-1]]):
            weights = [qi * math.exp(value / beta) for qi, value in zip(q, values)]
            star = [w / sum(weights) for w in weights]
            kl += sum(s * math.log(s / qi) for s, qi in zip(star, q)) / 2
            best += sum(s * value for s, value in zip(star, values)) / 2
        assert_same(world.frontier(ref, rewards, [beta]), [[kl], [best]], 1e-12,
                    what="the frontier")
        assert world.beta_at_kl(ref, rewards, kl) == pytest.approx(beta, rel=1e-9)


def test_a_larger_beta_is_a_shorter_leash(small):
    *_, logq, rt = small
    kl, reward = world.frontier(logq[None], rt[None], [0.1, 0.5, 1, 2, 10, 1e4])
    assert kl == sorted(kl, reverse=True) and reward == sorted(reward, reverse=True)
    assert kl[-1] < 1e-7, "with beta to infinity comes the reference (claim 4)"


def test_nothing_lies_above_the_frontier(small):
    """60 random policies against the best reward at their own KL, and the optimum itself lies
    on the frontier. Tolerance 1e-9."""
    *_, logq, rt = small
    torch.manual_seed(0)
    most = world.kl(world.optimal_policy(logq, rt, 1e-3), logq).item()
    for _ in range(60):
        change = torch.randn(7, dtype=torch.float64) * torch.rand(1, dtype=torch.float64)
        logp = torch.log_softmax(logq + change, -1)
        kl = world.kl(logp, logq).item()
        best = world.optimal_policy(logq, rt, world.beta_at_kl(logq[None], rt[None], kl))
        assert world.kl(best, logq).item() == pytest.approx(min(kl, most), abs=1e-9)
        assert world.expected(logp, rt) <= world.expected(best, rt) + 1e-9
    kl = world.kl(world.optimal_policy(logq, rt, 0.7), logq)
    assert world.beta_at_kl(logq[None], rt[None], kl) == pytest.approx(0.7, rel=1e-6)


def test_a_kl_that_no_beta_has_gives_the_nearest_beta_of_the_search(small):
    """It searches from 1e-3 to 1e6. Beyond the largest KL, the best reward is the maximum."""
    *_, logq, rt = small
    least = world.beta_at_kl(logq[None], rt[None], 50.0)
    assert least == pytest.approx(1e-3, rel=1e-12)
    best = world.optimal_policy(logq, rt, least)
    assert world.expected(best, rt).item() == pytest.approx(rt.max().item(), abs=1e-9)
    assert world.beta_at_kl(logq[None], rt[None], -1.0) == pytest.approx(1e6, rel=1e-12)


def test_ill_formed_text_is_one_more_outcome():
    """Of two prompts, to 1e-12. It is worth -5. Its probability is 1e-12 where float32's rounding
    has put the sum of the others above 1."""
    logps = torch.tensor([[0.6, 0.1], [0.5, 0.5 + 1e-7]], dtype=torch.float64).log()
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    p, r = world.with_ill_formed(logps, rewards)
    outcomes = torch.tensor([[0.6, 0.1, 0.3], [0.5, 0.5 + 1e-7, 1e-12]], dtype=torch.float64)
    assert_same(p, outcomes.log(), 1e-12, what="log p")
    want = torch.tensor([[1.0, 2.0, -5.0], [3.0, 4.0, -5.0]], dtype=torch.float64)
    assert_same(r, want, 1e-12, what="the reward")


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


# ---- What is said of ill-formed text, and of pairs that the reference did not write

def test_counting_ill_formed_text_as_one_outcome_bounds_kl_and_j(small):
    """Of 7 responses the last 3 are ill-formed. The KL of the 5 outcomes is at most the KL of the 7
    responses. It is equal to it where both policies share out ill-formed text alike. J is bounded
    the other way. The win rate is the same. The sums are written out (1e-12)."""
    p, q, _, logp, logq, _ = small
    r = [1.5, -0.3, 0.2, 0.2] + 3 * [world.ILL_FORMED_REWARD]
    well_formed = torch.tensor(r[:4], dtype=torch.float64)
    p_all, r_all = world.with_ill_formed(logp[:4], well_formed)
    q_all, _ = world.with_ill_formed(logq[:4], well_formed)
    least = world.kl(p_all, q_all).item()
    kl = sum(pi * math.log(pi / qi) for pi, qi in zip(p, q))
    among = sum(pi / sum(p[4:]) * math.log(pi / sum(p[4:]) * sum(q[4:]) / qi)
                for pi, qi in zip(p[4:], q[4:]))  # the KL between the shares of ill-formed text
    assert among > 0.01 and kl == pytest.approx(least + sum(p[4:]) * among, abs=1e-12), (
        "the KL of all text is the KL of the outcomes, plus the KL among ill-formed text")
    most = world.expected(p_all, r_all).item() - least
    assert most > sum(pi * ri for pi, ri in zip(p, r)) - kl
    wins = sum(pi * qj * (1.0 if a > b else 0.5 if a == b else 0.0)
               for pi, a in zip(p, r) for qj, b in zip(q, r))
    assert world.win_rate(p_all, q_all, r_all).item() == pytest.approx(wins, abs=1e-12)
    alike = logq[4:] + math.log(sum(p[4:]) / sum(q[4:]))  # (3,)
    same_shares = torch.cat([logp[:4], alike])  # (7,)
    assert world.kl(same_shares, logq).item() == pytest.approx(least, abs=1e-12)


def test_the_missing_mass_of_pairs_that_others_wrote_is_biased():
    """Of 5 responses an author writes the first 4, and the reference all 5. The oracle is a sum
    over responses (1e-12). With the author's pairs, E[missing mass] at pi* is not the mass that is
    missing, and its gradient is not 0. With the author's probabilities in the place of the
    reference's, both are exact. With pairs of the reference itself it is 0 for every policy: the
    reference writes all text, and no mass is missing from all text."""
    author = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    ref = torch.tensor([0.3, 0.35, 0.2, 0.13, 0.02], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0, -1.0, 2.0, -50.0], dtype=torch.float64)  # the fifth is bad
    star = world.optimal_policy(ref.log(), reward, 1.0)  # (5,)
    leaky = torch.tensor([0.3, 0.1, 0.1, 0.1, 0.4], dtype=torch.float64).log()  # (5,)

    def mean_and_pull(writer, denominator, policy=star):
        """E_{y ~ writer}[missing_mass], and the largest entry of its gradient in the logits."""
        theta = policy.clone().requires_grad_()
        logps = torch.log_softmax(theta, -1)  # (5,)
        each = [w * missing_mass(logps[y:y + 1], denominator[y:y + 1].log())
                for y, w in enumerate(writer)]
        return sum(each).item(), torch.autograd.grad(sum(each), theta)[0].abs().max().item()

    of_author = mean_and_pull(author, ref)
    want = 1 - sum(a * s / q for a, s, q in zip(author.tolist(), star.exp().tolist(), ref.tolist()))
    assert of_author[0] == pytest.approx(want, abs=1e-12) and abs(want) > 0.01
    assert of_author[1] > 0.01, "pairs of another author pull at pi*"
    exact = mean_and_pull(author, author)
    assert exact == pytest.approx((0, 0), abs=1e-12), "divided by the author's own probabilities"
    assert mean_and_pull(author, author, leaky)[0] == pytest.approx(0.4, abs=1e-12)
    for policy in (star, leaky):
        assert mean_and_pull(ref, ref, policy) == pytest.approx((0, 0), abs=1e-12)
