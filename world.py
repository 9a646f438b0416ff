"""The toy world: film reviews, what they are truly worth, and the paper's quantities, exactly.

A prompt names a genre and a subject: "comedy: the pacing was". A response is a short review:
" not very funny, but scary. I loved it." A grammar defines the 2,304 well-formed responses and
how likely each is. `true_reward` says what each is worth. All can be listed, so a sum over all y
is a sum here, not an estimate. Equation numbers are those of https://arxiv.org/abs/2305.18290v3.
"""
import itertools
import math
import re

import torch

# ---- The grammar
# A response is: modifier, adjective, connective, modifier, adjective, verdict. The numbers are
# the probabilities with which reviewers, and so the SFT corpus, choose a word.

MODIFIERS = {"": 0.40, " very": 0.25, " not": 0.20, " not very": 0.15}
CONNECTIVES = {" and": 0.6, ", but": 0.4}
VERDICTS = {"loved": 0.5, "hated": 0.5}
GENRES = ["comedy", "horror", "drama", "romance"]

# What an adjective is worth in each genre. A reviewer speaks of the craft first and of the mood
# second, so that no review says the same word twice.
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

# Each subject adds 1 to one adjective and takes 1 from its opposite. So a genre and a subject
# that were never seen together pose a new problem. Its answer follows from what is known of each.
SUBJECTS = {
    "plot": (" clever", " clumsy"), "pacing": (" superb", " dull"),
    "acting": (" grave", " funny"), "ending": (" superb", " dull"),
    "music": (" grave", " funny"), "dialogue": (" funny", " grave"),
    "opening": (" funny", " grave"), "lighting": (" clever", " clumsy"),
}

# "not" flips and softens, "very" amplifies, and what follows "but" counts more than what is
# before it. Every genre holds each value as often with a plus as with a minus, and an adjective's
# probability depends on the square of its value. So praise and blame are equally likely, the
# mean reward is 0 for every prompt, and nothing favours long reviews by accident.
SCALE = {"": 1.0, " very": 1.5, " not": -0.8, " not very": -0.5}
WEIGHTS = {" and": (0.5, 0.5), ", but": (0.25, 0.75)}
VERDICT_REWARD = {"loved": 0.6, "hated": -0.6}
ILL_FORMED_REWARD = -5.0  # below every well-formed response


def one_of(words):
    """A regular expression for one of the words."""
    return "(" + "|".join(re.escape(word) for word in words) + ")"


PROMPT = re.compile(f"{one_of(GENRES)}: the {one_of(SUBJECTS)} was")
RESPONSE = re.compile(one_of(MODIFIERS) + one_of(CRAFT) + one_of(CONNECTIVES)
                      + one_of(MODIFIERS) + one_of(MOOD) + rf"\. I {one_of(VERDICTS)} it\.")


def prompts():
    """Train prompts and held-out prompts, two lists. Every genre and every subject is trained on,
    but 8 of the 32 combinations are held out."""
    train, held_out = [], []
    for g, genre in enumerate(GENRES):
        for s, subject in enumerate(SUBJECTS):
            side = held_out if (s - g) % 4 == 0 else train
            side.append(f"{genre}: the {subject} was")
    return train, held_out  # 24 and 8 prompts


def responses():
    """Every well-formed response, a list of 2,304 strings."""
    slots = itertools.product(MODIFIERS, CRAFT, CONNECTIVES, MODIFIERS, MOOD, VERDICTS)
    return [f"{m1}{a1}{c}{m2}{a2}. I {v} it." for m1, a1, c, m2, a2, v in slots]


def grammar_logps(prompts):
    """log p(response | prompt) under the grammar, (P, 2304) float64, in the order of `responses`.

    The weight of an adjective is its value in the genre squared, and twice that where the subject
    concerns it. The other choices do not depend on the prompt.
    """
    rows = []
    for prompt in prompts:
        genre, subject = PROMPT.fullmatch(prompt).groups()
        weight = {}
        for adjective, values in VALENCE.items():
            weight[adjective] = values[GENRES.index(genre)] ** 2
            if adjective in SUBJECTS[subject]:
                weight[adjective] *= 2
        craft = {a: weight[a] for a in CRAFT}
        mood = {a: weight[a] for a in MOOD}
        logps = []
        for slot in (MODIFIERS, craft, CONNECTIVES, MODIFIERS, mood, VERDICTS):
            w = torch.tensor(list(slot.values()), dtype=torch.float64)  # (words,)
            logps.append((w / w.sum()).log())
        rows.append(sum(torch.meshgrid(*logps, indexing="ij")).flatten())  # (2304,)
    return torch.stack(rows)  # (P, 2304)


def parse(response):
    """(modifier, adjective, connective, modifier, adjective, verdict), or None if ill-formed."""
    match = RESPONSE.fullmatch(response)
    return match.groups() if match else None


def true_reward(prompt, response):
    """r*(x, y): what the response is worth, a float. Ill-formed text gets ILL_FORMED_REWARD.
    Raises ValueError for a prompt that is not of this world."""
    match = PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"{prompt!r} is not a prompt of the toy world, as {prompts()[0][0]!r} is; "
                         f"genres: {GENRES}, subjects: {list(SUBJECTS)}")
    parsed = parse(response)
    if parsed is None:
        return ILL_FORMED_REWARD
    genre, subject = match.groups()
    favoured, disfavoured = SUBJECTS[subject]

    def clause(modifier, adjective):
        value = VALENCE[adjective][GENRES.index(genre)]
        value += (adjective == favoured) - (adjective == disfavoured)
        return SCALE[modifier] * value

    m1, a1, connective, m2, a2, verdict = parsed
    w1, w2 = WEIGHTS[connective]
    return w1 * clause(m1, a1) + w2 * clause(m2, a2) + VERDICT_REWARD[verdict]


# ---- Annotators. Each scores both responses of a pair, and prefers one of them by Eq. 1.

def ai_score(prompt, response):
    """The AI judge: noisier (it sees 0.6 of every difference), and biased towards "very"."""
    return 0.6 * true_reward(prompt, response) + 0.4 * response.count(" very")


def length_score(prompt, response):
    """An annotator who prefers longer text: the true reward plus 0.5 for every word."""
    return true_reward(prompt, response) + 0.5 * len(response.split())


ANNOTATORS = {"human": true_reward, "ai": ai_score, "length": length_score}


def preference_prob(score_a, score_b):
    """p(a preferred to b | x) = sigma(score(x,a) - score(x,b)), Eq. 1. Tensors of one shape."""
    return torch.sigmoid(score_a - score_b)  # Eq. 1


def rewards(prompts, texts, score=true_reward):
    """The score of every text for every prompt, (P, N) float64."""
    return torch.tensor([[score(x, y) for y in texts] for x in prompts], dtype=torch.float64)


# ---- The exact quantities
# A policy is given by its log-probabilities of all responses: logps (..., N) in float64, one row
# for each prompt. The same holds for the reference. A reward has the same shape.

def normalise(logps):
    """The policy, given that its text is well-formed: log-probabilities that sum to 1. (..., N)"""
    return logps - logps.logsumexp(-1, keepdim=True)  # (..., N)


def log_partition(ref_logps, reward, beta):
    """log Z(x), Z(x) = sum_y ref(y|x) exp(r(x,y)/beta), below Eq. 4. (..., N) each -> (...)"""
    return (ref_logps + reward / beta).logsumexp(-1)  # (...)


def partition(ref_logps, reward, beta):
    """Z(x). (..., N) each -> (...). A small beta overflows here, but not in `log_partition`."""
    return log_partition(ref_logps, reward, beta).exp()  # (...)


def optimal_policy(ref_logps, reward, beta):
    """log pi*(y|x), pi* = ref(y|x) exp(r(x,y)/beta) / Z(x), Eq. 4. (..., N) each -> (..., N)"""
    return ref_logps + reward / beta - log_partition(ref_logps, reward, beta).unsqueeze(-1)


def expected(logps, reward):
    """E_{y ~ policy}[r(x,y)], in units of reward. (..., N) each -> (...)"""
    return (logps.exp() * reward).sum(-1)  # (...)


def kl(logps, ref_logps):
    """KL(policy || ref), in nats a response. (..., N) each -> (...)"""
    terms = logps.exp() * (logps - ref_logps)  # (..., N)
    return torch.where(logps == -math.inf, 0.0, terms).sum(-1)  # 0 log 0 = 0


def mass_by_reward(logps, reward):
    """logps, reward (N,) -> the K different rewards from low to high (K,), the index of each
    response's reward among them (N,), and the probability of each reward (K,)."""
    value, rank = torch.unique(reward.round(decimals=9), return_inverse=True)  # (K,), (N,)
    mass = torch.zeros(len(value), dtype=logps.dtype).index_add(0, rank, logps.exp())  # (K,)
    return value, rank, mass


def win_rate(logps, ref_logps, reward):
    """P(r(y) > r(y_ref)) + P(r(y) = r(y_ref))/2 for y ~ policy and y_ref ~ ref, independent.

    (..., N) each -> (...). The reference's mass below each reward is a cumulative sum.
    """
    if reward.dim() > 1:  # one prompt at a time
        return torch.stack([win_rate(*row) for row in zip(logps, ref_logps, reward)])
    _, rank, ref_mass = mass_by_reward(ref_logps, reward)  # (N,), (K,)
    below = ref_mass.cumsum(0) - ref_mass  # (K,)
    wins = below + ref_mass / 2  # (K,): a tie counts 1/2
    return (logps.exp() * wins[rank]).sum()


def label_ceiling(logps, reward):
    """The accuracy of the perfect judge. (..., N) each -> (...)

    It is how often r* agrees with a Bradley-Terry label of two independent responses of a policy.
    A model that does better on its training labels has learned their noise.
    """
    if reward.dim() > 1:  # one prompt at a time
        return torch.stack([label_ceiling(*row) for row in zip(logps, reward)])
    value, _, mass = mass_by_reward(logps, reward)  # (K,), (K,)
    margin = (value[:, None] - value[None, :]).abs()  # (K, K)
    return mass @ torch.sigmoid(margin) @ mass  # Bradley-Terry, Eq. 1


def with_ill_formed(logps, reward):
    """All ill-formed text as one more outcome: (..., N) logps and rewards -> (..., N+1) of each.

    Which ill-formed text a policy writes is not seen. So a KL is at most that over all text, and a
    J is at least that over all text. A win rate is exact, because ill-formed text has one reward.
    """
    missing = 1 - logps.exp().sum(-1, keepdim=True)  # (..., 1)
    missing = missing.clamp(min=1e-12)  # float32's rounding can make the sum 1 + 1e-7
    low = torch.full_like(reward[..., :1], ILL_FORMED_REWARD)  # (..., 1)
    return torch.cat([logps, missing.log()], -1), torch.cat([reward, low], -1)


def frontier(ref_logps, reward, betas):
    """The best reward that any policy can have at a given KL: two lists, KL and E[r], means over
    prompts, for each beta. One beta for all prompts is best, since dE[r]/dKL = beta."""
    stars = [optimal_policy(ref_logps, reward, beta) for beta in betas]  # each (P, N)
    kls = [kl(star, ref_logps).mean().item() for star in stars]
    return kls, [expected(star, reward).mean().item() for star in stars]


def beta_at_kl(ref_logps, reward, target_kl):
    """The beta at which pi* has the given KL, a mean over prompts.

    Bisection on log beta: the KL falls as beta grows. A KL that no beta has gives 1e-3 or 1e6.
    """
    low, high = 1e-3, 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        if kl(optimal_policy(ref_logps, reward, middle), ref_logps).mean() > target_kl:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
