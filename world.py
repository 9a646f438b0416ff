"""The toy world: film reviews, what they are truly worth, and every quantity of the DPO paper computed exactly.

A prompt names a genre and a subject: "comedy: the pacing was". A response is a short review:
" not very funny, but scary. I loved it." A grammar defines the 2,304 well-formed responses and how likely a reviewer
is to write each; `true_reward` says what each is worth. Because the responses can be listed, sums over all y are sums,
not estimates: Z(x), the optimal policy, KL, the reward-KL frontier and win rates, for a real transformer.

Equation numbers are those of the DPO paper, https://arxiv.org/abs/2305.18290v3. This file imports nothing of the project's.
"""
import itertools
import math
import re

import torch

# --------------------------------------------------------------------------------------------------------------------
# The grammar. A response is: modifier adjective connective modifier adjective verdict.
# The numbers are the probabilities with which reviewers (and so the SFT corpus) choose a word; adjectives are equally
# likely.

MODIFIERS = {"": 0.40, " very": 0.25, " not": 0.20, " not very": 0.15}
CONNECTIVES = {" and": 0.6, ", but": 0.4}
VERDICTS = {"loved": 0.5, "hated": 0.5}

# What an adjective is worth, by genre. Reviewers speak of the craft first and of the mood second, so that no review says
# the same word twice.
GENRES = ["comedy", "horror", "drama", "romance"]
CRAFT = {
    " superb": [+2, +2, +2, +2],
    " clever": [+1, +1, +1, +1],
    " funny":  [+2, -2, -1, +1],
    " grave":  [-2, +2, +1, -1],
    " clumsy": [-1, -1, -1, -1],
    " dull":   [-2, -2, -2, -2],
}
MOOD = {
    " scary":  [-2, +2, -1, -2],
    " tense":  [-1, +1, +1, -1],
    " dark":   [-1, +2, +1, -2],
    " tender": [+1, -2, +2, +2],
    " sweet":  [+1, -1, -1, +2],
    " silly":  [+2, -2, -2, +1],
}
VALENCE = CRAFT | MOOD
# Each subject favours one adjective by 1 and disfavours its opposite. With these, a genre and a subject never seen together
# pose a new problem, whose answer follows from what is known of each.
SUBJECTS = {
    "plot": (" clever", " clumsy"),
    "pacing": (" superb", " dull"),
    "acting": (" grave", " funny"),
    "ending": (" superb", " dull"),
    "music": (" grave", " funny"),
    "dialogue": (" funny", " grave"),
    "opening": (" funny", " grave"),
    "lighting": (" clever", " clumsy"),
}
# Every column of either half holds each value as often with a plus as with a minus, and what an adjective's frequency
# depends on (see `grammar_logps`) is alike for both. So praise and blame are equally likely in the grammar, whatever the
# modifiers: the mean reward is 0 for every prompt and every length of review, and nothing favours length by accident.
SCALE = {"": 1.0, " very": 1.5, " not": -0.8, " not very": -0.5}        # "not" flips and softens, "very" amplifies
WEIGHTS = {" and": (0.5, 0.5), ", but": (0.25, 0.75)}                     # what follows "but" counts more
VERDICT_REWARD = {"loved": 0.6, "hated": -0.6}
ILL_FORMED_REWARD = -5.0                                                # below every well-formed response

_word = lambda words: "(" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + ")"
RESPONSE = re.compile(_word(MODIFIERS) + _word(CRAFT) + _word(CONNECTIVES) + _word(MODIFIERS) + _word(MOOD)
                      + r"\. I " + _word(VERDICTS) + r" it\.")
PROMPT = re.compile(_word(GENRES) + ": the " + _word(SUBJECTS) + " was")


def prompts():
    """Train and held-out prompts, two lists. The split is by combination and comes before anything else: every genre and
    every subject is trained on, 8 of the 32 combinations never are."""
    split = {True: [], False: []}
    for g, genre in enumerate(GENRES):
        for s, subject in enumerate(SUBJECTS):
            split[(s - g) % 4 == 0].append(f"{genre}: the {subject} was")
    return split[False], split[True]


def responses():
    """Every well-formed response, a list of 2,304 strings."""
    return [f"{m1}{a1}{c}{m2}{a2}. I {v} it." for m1, a1, c, m2, a2, v in
            itertools.product(MODIFIERS, CRAFT, CONNECTIVES, MODIFIERS, MOOD, VERDICTS)]


def grammar_logps(prompts):
    """log p(response | prompt) under the grammar, (P, 2304) float64, in the order of `responses`.

    Reviewers mention an adjective the more often the stronger it speaks in this genre (as its valence squared), and twice
    as often if the subject calls for it. The other choices do not depend on the prompt.
    """
    rows = []
    for prompt in prompts:
        genre, subject = PROMPT.fullmatch(prompt).groups()
        adjective = lambda a: VALENCE[a][GENRES.index(genre)] ** 2 * (2 if a in SUBJECTS[subject] else 1)
        slots = [MODIFIERS, {a: adjective(a) for a in CRAFT}, CONNECTIVES, MODIFIERS, {a: adjective(a) for a in MOOD}, VERDICTS]
        logps = [torch.tensor(list(s.values()), dtype=torch.float64) for s in slots]
        logps = [(w / w.sum()).log() for w in logps]
        rows.append(sum(torch.meshgrid(*logps, indexing="ij")).flatten())
    return torch.stack(rows)


def parse(response):
    """(modifier, adjective, connective, modifier, adjective, verdict) of a well-formed response, None of any other text."""
    match = RESPONSE.fullmatch(response)
    return match.groups() if match else None


def true_reward(prompt, response):
    """r*(x, y): what the response is worth, a float. Any text has a reward: ill-formed text gets ILL_FORMED_REWARD.

    Raises ValueError for a prompt that is not of this world, for which no reward is defined.
    """
    match = PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"{prompt!r} is not a prompt of the toy world; one is {prompts()[0][0]!r}: "
                         f"a genre of {GENRES} and a subject of {list(SUBJECTS)}")
    parsed = parse(response)
    if parsed is None:
        return ILL_FORMED_REWARD
    genre, subject = match.groups()

    def clause(modifier, adjective):
        favoured, disfavoured = SUBJECTS[subject]
        valence = VALENCE[adjective][GENRES.index(genre)] + (adjective == favoured) - (adjective == disfavoured)
        return SCALE[modifier] * valence

    m1, a1, connective, m2, a2, verdict = parsed
    w1, w2 = WEIGHTS[connective]
    return w1 * clause(m1, a1) + w2 * clause(m2, a2) + VERDICT_REWARD[verdict]


# --------------------------------------------------------------------------------------------------------------------
# Annotators. Each scores both responses and prefers one with Bradley-Terry's probability, Eq. 1:
# p(a preferred to b | x) = sigma(score(x, a) - score(x, b)).

def ai_score(prompt, response):
    """The AI judge: noisier than a human (it sees 0.6 of every difference) and biased: it likes emphasis, +0.4 a "very"."""
    return 0.6 * true_reward(prompt, response) + 0.4 * response.count(" very")


def length_score(prompt, response):
    """An annotator who prefers longer text: the true reward plus 0.5 a word."""
    return true_reward(prompt, response) + 0.5 * len(response.split())


ANNOTATORS = {"human": true_reward, "ai": ai_score, "length": length_score}


def preference_prob(score_a, score_b):
    """Eq. 1: the probability that a is preferred to b. Tensors of any one shape, in units of reward."""
    return torch.sigmoid(score_a - score_b)


def rewards(prompts, texts, score=true_reward):
    """The score of every text for every prompt, (P, N) float64."""
    return torch.tensor([[score(x, y) for y in texts] for x in prompts], dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------------
# The exact quantities. A policy is its log-probabilities of every response, logps (..., N), one row a prompt, float64.

def normalise(logps):
    """The policy given that its text is well-formed: (..., N) log-probabilities that sum to 1."""
    return logps - logps.logsumexp(-1, keepdim=True)


def log_partition(ref_logps, reward, beta):
    """log Z(x), Z(x) = sum_y ref(y|x) exp(r(x,y)/beta), below Eq. 4. (..., N), (..., N) -> (...)"""
    return (ref_logps + reward / beta).logsumexp(-1)


def partition(ref_logps, reward, beta):
    """Z(x). (..., N), (..., N) -> (...). For a small beta it overflows where `log_partition` does not."""
    return log_partition(ref_logps, reward, beta).exp()


def optimal_policy(ref_logps, reward, beta):
    """log pi*(y|x), pi* = ref(y|x) exp(r(x,y)/beta) / Z(x), Eq. 4. (..., N), (..., N) -> (..., N)"""
    return ref_logps + reward / beta - log_partition(ref_logps, reward, beta).unsqueeze(-1)


def expected(logps, reward):
    """E_{y ~ policy}[r(x,y)]. (..., N), (..., N) -> (...), in units of reward."""
    return (logps.exp() * reward).sum(-1)


def kl(logps, ref_logps):
    """KL(policy || ref), (..., N), (..., N) -> (...), nats a response."""
    return torch.where(logps == -math.inf, 0.0, logps.exp() * (logps - ref_logps)).sum(-1)


def win_rate(logps, ref_logps, reward):
    """P(r(y) > r(y_ref)) + P(r(y) = r(y_ref))/2 for independent y ~ policy, y_ref ~ ref. (..., N) each -> (...)

    Exact in N log N: with the rewards sorted, the reference's mass below each reward is a cumulative sum.
    """
    def one(p, q, r):
        _, rank = torch.unique(r.round(decimals=9), return_inverse=True)       # equal rewards share a rank, low to high
        q_rank = torch.zeros(int(rank.max()) + 1, dtype=q.dtype).index_add(0, rank, q)
        below = q_rank.cumsum(0) - q_rank
        return (p * (below + q_rank / 2)[rank]).sum()

    flat = [t.reshape(-1, t.size(-1)) for t in (logps.exp(), ref_logps.exp(), reward)]
    return torch.stack([one(*row) for row in zip(*flat)]).reshape(logps.shape[:-1])


def label_ceiling(logps, reward):
    """The accuracy of the perfect judge: how often r* agrees with a Bradley-Terry label of two independent responses of a
    policy, ties counted 1/2. (..., N), (..., N) -> (...). No model does better on fresh labels; one that does better on its
    training labels has learned their noise."""
    def one(p, r):
        value, rank = torch.unique(r.round(decimals=9), return_inverse=True)
        mass = torch.zeros(len(value), dtype=p.dtype).index_add(0, rank, p)                            # (K,)
        return mass @ torch.sigmoid((value[:, None] - value[None, :]).abs()) @ mass

    flat = [t.reshape(-1, t.size(-1)) for t in (logps.exp(), reward)]
    return torch.stack([one(*row) for row in zip(*flat)]).reshape(logps.shape[:-1])


def with_ill_formed(logps, reward):
    """All ill-formed text as one more outcome: (..., N) log-probabilities that sum to less than 1 and their rewards ->
    (..., N+1). What happens among ill-formed texts is not resolved, so a KL of such policies is a lower bound."""
    missing = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-12)           # clamp: float32's rounding can reach 1 + 1e-7
    return (torch.cat([logps, missing.log()], -1),
            torch.cat([reward, torch.full_like(reward[..., :1], ILL_FORMED_REWARD)], -1))


def frontier(ref_logps, reward, betas):
    """The best reward that any policy can have at a given KL, averaged over prompts: two lists, KL and E[r], a beta each.

    One beta for all prompts is best for the average: at the optimum dE[r]/dKL = beta must be the same for each prompt.
    """
    stars = [optimal_policy(ref_logps, reward, beta) for beta in betas]
    return ([kl(star, ref_logps).mean().item() for star in stars],
            [expected(star, reward).mean().item() for star in stars])


def beta_at_kl(ref_logps, reward, target_kl):
    """The beta at which pi* has the given KL (mean over prompts), by bisection on log beta; KL falls as beta grows.

    Beyond the KL that pi* reaches as beta goes to 0, more KL buys no more reward: then the smallest beta, 1e-3, is returned.
    """
    low, high = 1e-3, 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        if kl(optimal_policy(ref_logps, reward, middle), ref_logps).mean() > target_kl:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


# --------------------------------------------------------------------------------------------------------------------
# Enumeration: a real transformer's probability of every response.

class Trie:
    """The distinct prefixes of a list of token sequences, level by level: each prefix is then evaluated once.

    sequences: N lists of token ids, no one a prefix of another (they end in EOS).
    levels[d]: the distinct prefixes of d+1 tokens that go on, as (parent, token): the index of the prefix without its
        last token in the level before, and that last token. Two tensors (n_d,).
    leaves[d]: where sequences of d+1 tokens end: (parent, token, which), which being the sequence's number.
    """

    def __init__(self, sequences):
        self.n = len(sequences)
        depth = max(map(len, sequences))
        nodes = {(): 0}                                       # prefix -> index in its level
        self.levels, self.leaves = [], []
        for d in range(depth):
            level, leaf, next_nodes = [], [], {}
            for i, s in enumerate(sequences):
                if len(s) <= d:
                    continue
                parent, prefix = nodes[tuple(s[:d])], tuple(s[:d + 1])
                if len(s) == d + 1:
                    leaf.append((parent, s[d], i))
                elif prefix not in next_nodes:
                    next_nodes[prefix] = len(level)
                    level.append((parent, s[d]))
            self.levels.append(torch.tensor(level, dtype=torch.long).reshape(-1, 2).t())
            self.leaves.append(torch.tensor(leaf, dtype=torch.long).reshape(-1, 3).t())
            nodes = next_nodes

    @torch.no_grad()
    def logps(self, model, prompt_ids):
        """log pi(y|x) of every sequence y after one prompt x: prompt_ids, a list of token ids -> (N,) float64, on the CPU.

        model: a GPT. Its key/value cache is passed from each prefix to the prefixes that extend it.
        """
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        out = torch.full((self.n,), -math.inf, dtype=torch.float64)
        cache = model.new_cache()
        logits = model(torch.tensor([prompt_ids], device=device), cache)[:, -1]               # (1, V)
        so_far = torch.zeros(1, dtype=torch.float64)                                          # log-prob of each prefix
        for (parent, token), (leaf_parent, leaf_token, which) in zip(self.levels, self.leaves):
            next_logps = torch.log_softmax(logits.float(), -1).cpu().double()                 # (n_{d-1}, V)
            out[which] = so_far[leaf_parent] + next_logps[leaf_parent, leaf_token]
            if len(parent) == 0:
                break
            so_far = so_far[parent] + next_logps[parent, token]                               # (n_d,)
            parent, token = parent.to(device), token.to(device)
            cache = [(k[parent], v[parent]) for k, v in cache]
            logits = model(token[:, None], cache)[:, -1]                                      # (n_d, V)
        model.train(was_training)
        return out
