"""docs/questions.md: every number of an answer is computed from the numbers of its question.
docs/teaching.md: what it names exists, and what it adds up is right.

A result stands in bold, as **0.693**. The function below that is named for its question gets the
question's numbers, in their order, and returns the results, in their order. It uses the project's
code, or plain arithmetic where the project has no such function. Any other number of an answer must
stand in its question, be one of its results, or be 0, 1 or 2.
"""
import contextlib
import io
import itertools
import json
import math
import re
import tomllib
from functools import lru_cache

import pytest
import torch

import dpo
import losses
import ppo
import rlhf
import world
from conftest import ROOT
from exercises import solutions
from lab import tabular
from tools import vector

QUESTIONS = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
TEACHING = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")


# ---- The page

NUMBER = r"(?<!\w)−?\d+(?:,\d{3})*(?:\.\d+)?"
RESULT = rf"\*\*({NUMBER})\*\*"
NO_NUMBERS = re.compile(  # code, links, and the numbers of equations, notebooks and sections
    r"```.*?```|`[^`]*`|\]\([^)]*\)|\b(?:Eq\.|notebook|[Ss]ection)\s+\d+", re.DOTALL)


def questions(page):
    """[(question, answer), ...]"""
    parts = re.findall(r"^\*\*(\d+)\.\*\* (.*?)\n\n<details><summary>Answer</summary>\n\n"
                       r"(.*?)\n\n</details>$", page, re.DOTALL | re.MULTILINE)
    assert [int(number) for number, *_ in parts] == list(range(1, len(parts) + 1))
    return [(" ".join(question.split()), answer) for _, question, answer in parts]


def value(text):
    return float(text.replace("−", "-").replace(",", ""))


def numbers(text):
    return [value(found) for found in re.findall(NUMBER, NO_NUMBERS.sub(" ", text))]


def shown_as(result, text):
    """Is this text the result? It has at least three decimals, or it is exact."""
    decimals = len(text.partition(".")[2])
    exact = abs(result - value(text)) < 1e-9
    return exact or decimals >= 3 and abs(result - value(text)) <= 0.5000001 * 10 ** -decimals


COMPUTED = {}  # {how a question begins: the function that computes its results}


def question(begins):
    def keep(function):
        @lru_cache(maxsize=None)
        def results(*numbers):
            return [float(x) for x in function(*numbers)]
        COMPUTED[begins] = results
        return function
    return keep


def computed_for(text):
    """The beginnings in COMPUTED with which this question begins. There should be one, or none."""
    return [begins for begins in COMPUTED if text.startswith(begins)]


def complaints(text, answer):
    """What is wrong with the numbers of an answer, a list of sentences."""
    found, given, shown, begins = [], numbers(text), re.findall(RESULT, answer), computed_for(text)
    results = COMPUTED[begins[0]](*given) if len(begins) == 1 else []
    if len(results) != len(shown):
        found.append(f"{len(results)} results are computed, and {len(shown)} stand in bold")
    for result, number in zip(results, shown):
        if not shown_as(result, number):
            found.append(f"{number} should be {result}")
    known = {0.0, 1.0, 2.0, *map(abs, given), *(abs(value(number)) for number in shown)}
    for number in numbers(re.sub(RESULT, " ", answer)):
        if abs(number) not in known:
            found.append(f"where does {number:g} come from?")
    return found


# ---- The results

def sigma(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log(1 + math.exp(x))


THREE = "A prompt has three responses, with π_ref = 0.5, 0.3, 0.2 and r = 0, 1, 2. β = 1. "


def three_responses(numbers):
    """π_ref and r of three responses, the first six of a question's numbers."""
    return vector(*numbers[:3]).log(), vector(*numbers[3:6])


@question(THREE + "Compute J")
def the_optimum(*given):
    (ref, reward), beta = three_responses(given), given[6]
    star = world.optimal_policy(ref, reward, beta)
    return (tabular.objective(ref, ref, reward, beta), world.partition(ref, reward, beta),
            *star.exp(), tabular.objective(star, ref, reward, beta))


@question(THREE + "The gr")
def the_greedy_policy(*given):
    (ref, reward), beta = three_responses(given), given[6]
    greedy, star = vector(0, 0, 1).log(), world.optimal_policy(ref, reward, beta)
    objective = tabular.objective(greedy, ref, reward, beta)
    gap = beta * world.kl(greedy, star)
    return world.kl(greedy, ref), objective, objective + gap, gap, star[2].exp()


@question("Is a larger β a longer or a shorter leash?")
def two_leashes(*given):
    ref, reward = three_responses(given)
    return [world.optimal_policy(ref, reward, beta)[2].exp() for beta in given[6:8]]


@question("A response is better than all others by 3")
def a_rare_response(better, beta, rare):
    ref = vector(rare, 1 - rare).log()
    return [world.optimal_policy(ref, vector(better, 0), beta)[0].exp()]


@question("Somebody adds 10")
def a_shifted_reward(shift, beta):
    ref, reward = tabular.random_world(4)
    both = [world.log_partition(ref, r, beta) for r in (reward, reward + shift)]
    policies = [world.optimal_policy(ref, r, beta) for r in (reward, reward + shift)]
    assert torch.allclose(*policies)
    return both[1] - both[0], beta * (both[1] - both[0])


@question("A log file of an optimal policy")
def a_log_file(first, second, beta):
    ref = vector(0.2, 0.2).log()
    policy = ref + vector(first, second).log()
    difference = solutions.reward_difference(policy, ref, beta, 0, 1)
    return difference, world.preference_prob(difference, torch.zeros(()))


@question("Why does Z(x) cancel")
def two_prompts(z1, z2, beta):
    return [beta * math.log(z2 / z1)]


@question("A policy is optimal at β = 0.5. Another")
def a_step_on_the_frontier(beta, nats):
    """The slope of world.frontier at this β is β, for any world."""
    ref, reward = tabular.random_world(5)
    kls, rewards = world.frontier(ref[None], reward[None], [beta + 1e-5, beta - 1e-5])
    slope = (rewards[1] - rewards[0]) / (kls[1] - kls[0])
    assert abs(slope - beta) < 1e-6
    return [round(slope, 5) * nats]


@question("Take the toy world's grammar")
def the_toy_world(beta):
    """Plain sums over dictionaries; and the code of the answer prints the same."""
    prompt = "comedy: the pacing was"
    mood, craft = (weighed(words, "comedy", "pacing") for words in (world.MOOD, world.CRAFT))
    mass = {}
    for m1, c, connective, m2, m, verdict in itertools.product(
            world.MODIFIERS, craft, world.CONNECTIVES, world.MODIFIERS, mood, world.VERDICTS):
        p = (world.MODIFIERS[m1] * craft[c] * world.CONNECTIVES[connective] * world.MODIFIERS[m2]
             * mood[m] * world.VERDICTS[verdict])
        text = f"{m1}{c}{connective}{m2}{m}. I {verdict} it."
        mass[text] = p, world.true_reward(prompt, text)
    z = sum(p * math.exp(r / beta) for p, r in mass.values())
    star = [(p * math.exp(r / beta) / z, p, r) for p, r in mass.values()]
    results = [len(mass), math.log(z), sum(q * r for q, _, r in star),
               sum(q * math.log(q / p) for q, p, _ in star)]
    code = re.search(r"```python\n(.*?)```", dict(questions(QUESTIONS))[toy_question()], re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code[1], {})
    assert list(map(float, printed.getvalue().split())) == pytest.approx(results)
    return results


def weighed(words, genre, subject):
    """The probabilities of adjectives: values squared, and twice that where the subject asks."""
    values = {word: row[world.GENRES.index(genre)] ** 2 * (1 + (word in world.SUBJECTS[subject]))
              for word, row in words.items()}
    return {word: v / sum(values.values()) for word, v in values.items()}


def toy_question():
    return next(text for text, _ in questions(QUESTIONS) if text.startswith("Take the toy"))


def one_pair(*numbers):
    """(loss, chosen reward, rejected reward, weight) of log π of y_w, y_l, the reference's, β."""
    *logps, beta = numbers
    loss, *rewards = dpo.dpo_loss(*(vector(x) for x in logps), beta)
    return loss, *rewards, dpo.gradient_weight(*rewards)


@question("What is the loss at step 0")
def step_0(_, beta):
    h = vector(0.0).requires_grad_()
    zero = torch.zeros_like(h)
    loss, *rewards = dpo.dpo_loss(h, zero, zero, zero, beta)
    loss.backward()
    return loss.item(), dpo.gradient_weight(*rewards), h.grad


@question("For one pair log π(y_w) = −10")
def a_worked_pair(*given):
    loss, chosen, rejected, weight = one_pair(*given)
    return chosen, rejected, chosen - rejected, loss, weight


@question("Write the gradient of Eq. 7")
def three_weights(*margins):
    return [dpo.gradient_weight(vector(margin), vector(0)) for margin in margins]


@question("What is the weight good for?")
def with_and_without_the_weight(beta, *numbers):
    """dt = dh / (2 β σ(−βh)) from 0 to h, as a sum over small steps; without the weight σ is 1."""
    ends = numbers[-2:]
    for end in ends:
        h = torch.linspace(0, end, 20_001, dtype=torch.float64)
        yield torch.trapezoid(1 / (2 * beta * torch.sigmoid(-beta * h)), h)
    yield from (end / (2 * beta) for end in ends)


@question("Does a smaller β learn faster?")
def flat_and_far(first, second, h, weight):
    for beta in (first, second):
        x = vector(h).requires_grad_()
        slope, = torch.autograd.grad(-torch.nn.functional.logsigmoid(beta * x).sum(), x,
                                     create_graph=True)
        yield torch.autograd.grad(slope.sum(), x)[0]
    yield from (math.log(1 / weight - 1) / beta for beta in (first, second))


@question("Of many people, a share of 0.8")
def many_people(share):
    margin = solutions.cdpo_margin(vector(share), 0.0, 1.0)
    return margin, solutions.pra_loss(margin, share, 1.0)


@question("For a pair log π(y_w) = −8")
def ranked_wrongly(*given):
    _, chosen, rejected, _ = one_pair(*given)
    return (chosen - rejected) / given[-1], chosen - rejected


@question("A bug lowers the reference's")
def a_lower_reference(lower, beta):
    right, wrong = (one_pair(-3, -4, -2 - x, -2 - x, beta) for x in (0, lower))
    assert right[0] == wrong[0] and right[3] == wrong[3]
    assert wrong[1] - right[1] == wrong[2] - right[2]
    return [wrong[1] - right[1]]


@question("A model gives every token the same")
def uniform_logits(vocab, length):
    vocab, length = int(vocab), int(length)
    tokens, mask = torch.zeros(1, length + 1).long(), torch.ones(1, length + 1).bool()
    logits = torch.zeros(1, length + 1, vocab, dtype=torch.float64)
    return [dpo.response_logps(logits, tokens, mask, average) for average in (False, True)]


@question("A row of a batch has 5 tokens")
def scored_tokens(prompt, response, padding, first):
    """Uniform logits count the tokens. One position gets other logits, and it is looked for."""
    prompt, n = int(prompt), int(prompt + response + 1 + padding)
    position = torch.arange(n)[None] + int(first)
    mask = (position >= prompt) & (position < prompt + response + 1)
    logits, tokens = torch.zeros(1, n, 4, dtype=torch.float64), torch.zeros(1, n).long()
    logp = dpo.response_logps(logits, tokens, mask)
    matters = []
    for t in range(n):
        other = logits.clone()
        other[0, t, 0] = 1
        if dpo.response_logps(other, tokens, mask) != logp:
            matters.append(t)
    return -logp / math.log(4), min(matters)


@question("A startup has 40,000")
def a_startup(pairs, epochs, batch):
    return [pairs * epochs / batch]


@question("In a run the log-probabilities of the chosen *and*")
def a_kl_from_rewards(beta, chosen, rejected):
    return [solutions.kl_from_rewards(vector(chosen), vector(rejected), beta)]


@question("In a third of the pairs")
def a_ceiling(first, second, _):
    shares = [sigma(difference) for difference in (0, first, second)]
    return *shares, sum(shares) / 3


@question("An annotator scores a text by its true reward plus 0.5")
def longer_text(per_word, words, beta):
    texts = "good", "good" + " good" * int(words)  # of the same reward, being ill-formed
    short, long = (world.length_score(world.prompts()[0][0], text) for text in texts)
    assert long - short == per_word * words, "world.length_score counts otherwise"
    ref = vector(0.5, 0.5).log()
    star = world.optimal_policy(ref, vector(long, short), beta)
    return long - short, sigma(long - short), (star[0] - star[1]).exp()


@question("A pair's two responses are y_w and y_l, and all")
def two_policies_with_one_loss(beta, *given):
    ref, a, b = (vector(*given[i:i + 3]).log() for i in (0, 3, 6))
    first, second = (one_pair(p[0], p[1], ref[0], ref[1], beta) for p in (a, b))
    yield (first[1] - first[2]) / beta
    yield from (first[0], second[0])


@question("The missing mass is 1 − mean")
def missing(_, ref, chosen, rejected):
    mass = losses.missing_mass(vector(chosen, rejected).log(), vector(ref, ref).log())
    return 1 - mass, mass


@question("The stray mass looks at one beginning")
def stray(*given):
    ref, policy, least = vector(*given[:3]), vector(*given[3:6]), given[6]
    assert least == losses.LIKELY
    return [losses.stray_mass(policy.log()[None], (ref >= least)[None])]


@question("A table has a free logit for each of three")
def a_step_in_a_table(*p):
    """The derivative of log softmax along the step (1, −1, 0), by central differences."""
    logits, step = vector(*p[:3]).log(), 1e-6 * vector(1, -1, 0)
    change = ((logits + step).log_softmax(0) - (logits - step).log_softmax(0)) / 2e-6
    return [round(x, 6) for x in [1 - change[0].item(), *change.tolist()]]


@question("Now three responses share one parameter")
def displacement(a, b, c, start, theta):
    features = vector(a, b, c)
    assert (start * features).softmax(0).tolist() == pytest.approx([1 / 3] * 3)
    return (theta * features).softmax(0)


@question("A table is trained with DPO. Two responses are in no pair")
def never_compared(first, second):
    ref = vector(0.5, 1 - 0.5 - first - second, first, second).log()
    end = tabular.gradient_flow(
        lambda theta: one_pair_loss(theta.log_softmax(0), ref), ref, time=5.0, steps=20)
    moved = end.log_softmax(0).exp()
    assert abs(moved[2] - first) > 0.01
    return [moved[2] / moved[3]]


def one_pair_loss(logps, ref):
    return dpo.dpo_loss(logps[:1], logps[1:2], ref[:1], ref[1:2], 1.0)[0].sum()


@question("A reference writes y₁ and y₂ with 0.5 each")
def supervised_and_dpo(half, preferred, beta):
    ref, preference = vector(half, half).log(), vector(half, preferred, 1 - preferred, half)
    reward = vector(preferred / (1 - preferred), 1).log()
    star = world.optimal_policy(ref, reward, beta)
    return tabular.preferred_ft(ref, preference.view(2, 2))[0].exp(), star[0].exp()


@question("A reward model gives y_w the number 1.2")
def a_reward_model(chosen, rejected, shift):
    return [rlhf.reward_model_loss(vector(chosen + x), vector(rejected + x)) for x in (0, shift)]


@question("An annotator ranks 4 responses")
def a_ranking(k, *rewards):
    reward = vector(*rewards)
    best = reward.softmax(0)[0]
    whole = tabular.plackett_luce(reward, [0, 1, 2]).exp()
    return math.comb(int(k), 2), best, whole / best, whole


@question("An AI judge sees 0.6")
def a_judge(scale, difference, beta):
    """The judge's optimum is people's at β/scale, and at β = scale it is people's at 1."""
    ref, reward = tabular.random_world(5)
    judged = world.optimal_policy(ref, scale * reward, beta)
    assert torch.allclose(judged, world.optimal_policy(ref, reward, beta / scale))
    undone = world.optimal_policy(ref, scale * reward, scale)
    assert torch.allclose(undone, world.optimal_policy(ref, reward, 1.0))
    return sigma(difference), sigma(scale * difference), beta / scale, scale


@question("\"DPO is more sample-efficient")
def batches(labels, generated, batch):
    return [generated / batch]


@question("Of the responses of the reference the best of 4")
def best_of_n(n, half, *_):
    ref, reward = vector(half, half).log(), vector(1, 0)
    best = tabular.best_of_n(ref, reward, int(n))
    return (*best.exp(), world.kl(best, ref), math.log(n) - (n - 1) / n, n / (n + 1),
            world.win_rate(best, ref, reward))


@question("Three responses have π_ref = 0.6")
def over_optimisation(*given):
    (ref, true), learned, betas = three_responses(given), vector(*given[6:9]), given[9:11]
    for policy in [ref, *(world.optimal_policy(ref, learned, beta) for beta in betas)]:
        yield from (world.expected(policy, learned), world.expected(policy, true))


@question("A response of three tokens gets the score 2")
def rewards_of_tokens(score, beta, *log_ratios):
    logps = vector(*log_ratios)[None]
    mask = torch.ones_like(logps).bool()
    rewards = ppo.token_rewards(vector(score), logps, torch.zeros_like(logps), mask, beta)
    return *rewards[0], rewards.sum(), *ppo.reward_to_go(rewards, mask)[0]


@question("Three tokens have the rewards 0, 0, 1")
def advantages(*given):
    rewards, values, gamma = vector(*given[:3])[None], vector(*given[3:6])[None], given[6]
    mask = torch.ones_like(rewards).bool()
    for lam in given[7:10]:
        yield from ppo.gae(rewards, values, mask, gamma, lam)[0]


@question("A token had the log-probability −1.2")
def a_clipped_token(old, new, advantage, clip, negative):
    mask = torch.ones(1, 1).bool()
    gains, moved = [], []
    for a in (advantage, negative):
        logp = vector(new)[None].requires_grad_()
        loss = ppo.ppo_loss(logp, vector(old)[None], vector(a)[None], mask, clip)
        loss.backward()
        gains.append(-loss.item())
        moved.append(bool(logp.grad.abs() > 0))
    assert moved == [False, True]
    return math.exp(new - old), 1 + clip, *gains


@question(THREE + "Which v")
def nothing_left_to_learn(*given):
    (ref, reward), beta = three_responses(given), given[6]
    return reward - tabular.implicit_reward(world.optimal_policy(ref, reward, beta), ref, beta)


@question("The policy draws a response with log π = −2")
def three_estimates(logp, ref_logp, *_):
    return torch.cat(tabular.kl_estimators(vector(logp), vector(ref_logp)))


@question("An implicit reward can be fitted to rewards")
def two_fits(h, beta, gap):
    p = sigma(gap)
    return (solutions.rda_loss(h, gap, beta), p, solutions.pra_loss(vector(h), p, beta),
            solutions.pra_loss(vector(gap / beta), p, beta))


def where_it_stops(loss, **options):
    """The h at which a loss, for a label that is always the same, has the slope 0. Bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        h, zero = vector((low + high) / 2).requires_grad_(), vector(0)
        loss(h, zero, zero, zero, **options)[0].sum().backward()
        low, high = (low, h.item()) if h.grad > 0 else (h.item(), high)
    return high


@question("cDPO assumes that a share")
def cdpo_stops(eps):
    return [where_it_stops(losses.cdpo_loss, beta=1.0, label_smoothing=eps)]


@question("What are cDPO's and robust DPO's losses")
def cdpo_and_robust(margin, eps):
    zero = vector(0)
    for loss in (losses.cdpo_loss, losses.robust_loss):
        yield loss(vector(margin), zero, zero, zero, beta=1.0, label_smoothing=eps)[0]


@question("IPO's loss is (h − 1/(2τ))²")
def ipo_and_hinge(*given):
    taus, beta, zero = given[2:4], given[-1], vector(0)
    yield from (where_it_stops(losses.ipo_loss, beta=tau) for tau in taus)
    h = torch.linspace(0, 20, 2001, dtype=torch.float64)
    flat = losses.hinge_loss(h, *[zero.expand(2001)] * 3, beta=beta)[0] < 1e-9
    yield h[flat][0]  # the first h at which the hinge is 0


@question("IPO ends at π ∝ π_ref")
def ipo_ends(half, preferred, tau):
    ref, preference = vector(half, half).log(), vector(half, preferred, 1 - preferred, half)
    worth = preference.view(2, 2) @ ref.exp()
    end = tabular.psi_policy(ref, preference.view(2, 2), ref, lambda p: p, tau)
    return *worth, (end[0] - end[1]).exp(), math.exp(1 / tau)


@question("Three responses have the rewards 2, 1 and 0. Every pair")
def do_the_demands_add_up(best, middle, worst, eps):
    assert best - middle == middle - worst
    near, far = (solutions.cdpo_margin(torch.sigmoid(vector(gap)), eps, 1.0)
                 for gap in (best - middle, best - worst))
    return near, far, 2 * near


@question("Mirror descent makes the step")
def mirror_descent(*given):
    (ref, reward), steps, t = three_responses(given), int(given[6]), given[7]
    policy = ref
    for _ in range(steps):
        policy = tabular.mirror_step(policy, reward, t)
    beta = 1 / (steps * t)
    assert torch.allclose(policy, world.optimal_policy(ref, reward, beta))
    return beta, policy[2].exp()


def token_level(half, q1, q2, beta):
    """V(s_0) and π* of one choice between two tokens, by tabular.soft_value_iteration."""
    values, policy = tabular.soft_value_iteration([vector(half, half).log()], [vector(q1, q2)],
                                                  beta)
    return values[0], policy[0]


@question("A state has two next tokens. The reference gives each 0.5, and they are worth Q = 1 and "
          "Q = −1. Compute")
def soft_values(half, q1, q2, *betas):
    return [token_level(half, q1, q2, beta)[0] for beta in betas]


@question("A state has two next tokens. The reference gives each 0.5, and they are worth Q = 1 and "
          "Q = −1. β = 1")
def a_token_s_advantage(half, q1, q2, beta):
    value, policy = token_level(half, q1, q2, beta)
    return policy[0].exp(), q1 - value


@question("For one response, β times the log-ratios")
def values_of_a_response(first, second, third, v0):
    return solutions.values_from_tokens(vector(first, second, third), vector(0, 0, 0), 1.0, v0)


@question("A policy does not start at the reference")
def another_start(policy, ref, beta, _):
    loss, chosen, rejected, _ = one_pair(policy, 0, ref, 0, beta)
    return (chosen - rejected) / beta, loss


@question("Three responses have r = 0, 1, 2. β = 1. The reference is left out")
def a_uniform_reference(*given):
    *reward, beta = given
    return world.optimal_policy(torch.zeros(3).double(), vector(*reward), beta).exp()


@question("Somebody writes −β log σ(h)")
def beta_outside(beta, _):
    return -beta * math.log(sigma(0)), one_pair(0, 0, 0, 0, beta)[0]


@question("Two pairs have the reference's log-ratios")
def a_shuffled_cache(first, second, beta, *_):
    pairs = [one_pair(first, 0, second, 0, beta), one_pair(second, 0, first, 0, beta)]
    yield from ((pair[1] - pair[2]) / beta for pair in pairs)
    yield from (pair[0] for pair in pairs)
    yield (pairs[0][0] + pairs[1][0]) / 2


# ---- The proofs

ALL = questions(QUESTIONS)


def test_every_number_of_an_answer_is_computed():
    for text, answer in ALL:
        assert not complaints(text, answer), f"{text[:60]}: {'; '.join(complaints(text, answer))}"
    asked = [begins for text, _ in ALL for begins in computed_for(text)]
    assert sorted(asked) == sorted(COMPUTED), "a function below has no question, or two"


def test_a_wrong_number_is_seen():
    """Every result, with its last digit changed, with another sign, and out of bold."""
    count = 0
    for text, answer in ALL:
        for match in re.finditer(RESULT, answer):
            number = match[1]
            count += 1
            other = number.removeprefix("−") if "−" in number else "−" + number
            digit = (int(number[-1]) + 1) % 10
            wrong = [f"**{number[:-1]}{digit}**", number]
            if value(number):
                wrong.append(f"**{other}**")
            for new in wrong:
                changed = answer[:match.start()] + new + answer[match.end():]
                assert complaints(text, changed), f"{text[:60]}: {match[0]} became {new}"
    assert count >= 100
    assert complaints("Why?", "Because of 3.") and not complaints("Why 3?", "Because of 3.")


def test_every_question_has_a_short_answer():
    assert len(ALL) >= 40
    for text, answer in ALL:
        assert text.endswith(("?", ".")), text
        lines = [line for line in re.sub(r"```.*?```", "", answer, flags=re.DOTALL).splitlines()
                 if line and not line.startswith("|")]
        assert 2 <= len(lines) <= 8, f"{text[:60]}: {len(lines)} lines"


# ---- docs/teaching.md

def notebook(number):
    """The cells of notebook 1 to 8 as one text, or None where it is still to come."""
    for file in (ROOT / "notebooks").glob(f"{number:02}_*.ipynb"):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        return "\n".join("".join(cell["source"]) for cell in cells)
    return None


def exercises_of(number):
    return set(re.findall(r"^#+ Exercise (\d\.\d)", notebook(number), re.MULTILINE))


def named_exercises():
    """Every exercise that the page names, those between "1.1 to 1.4" included."""
    text = re.sub(r"\]\([^)]*\)", "]", " ".join(TEACHING.split()))
    found = set(re.findall(r"\b\d\.\d\b", text))
    for chapter, first, same, last in re.findall(r"\b(\d)\.(\d) to (\d)\.(\d)\b", text):
        assert chapter == same
        found |= {f"{chapter}.{n}" for n in range(int(first), int(last) + 1)}
    return found


def test_the_plan_names_every_notebook_and_every_exercise():
    """No exercise is named that is not there, and none is left out."""
    there = [number for number in range(1, 9) if notebook(number) is not None]
    named = named_exercises()
    assert there == list(range(1, 9))
    for number in there:
        assert {x for x in named if x[0] == str(number)} == exercises_of(number), number
    assert {int(x[0]) for x in named} == set(there)
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"](../notebooks/{file.name})" in TEACHING, file.name


def test_the_sections_of_the_notebooks_that_a_lecture_uses_are_there():
    rows = re.findall(r"notebook (\d\d), sections? (\d)(?: (to|and) (\d))?", TEACHING)
    assert len(rows) >= 10
    for number, first, _, last in rows:
        for section in (first, last or first):
            assert re.search(rf"^## {section} ", notebook(int(number)), re.MULTILINE), number


def test_every_link_of_the_two_pages_leads_somewhere():
    for page in (QUESTIONS, TEACHING):
        for path, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", page):
            file = ROOT / "docs" / path if path else ROOT / "docs" / "questions.md"
            assert file.exists(), path
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert not anchor or anchor in known, f"{path}#{anchor}"


def test_the_minutes_of_a_lesson_add_up():
    lessons = re.findall(r"^## Le?[ca]\w+ \d: .*?In all \d+ minutes", TEACHING, re.DOTALL | re.M)
    assert [lesson[3:10].strip(": ") for lesson in lessons] == [
        "Lecture", "Lab 1", "Lecture", "Lab 2", "Lab 3"]
    for lesson in lessons:
        minutes = [int(row) for row in re.findall(r"^\| (\d+) \|", lesson, re.MULTILINE)]
        assert f"In all {sum(minutes)} minutes" in lesson, lesson


def test_the_verdicts_bugs_and_points_are_todays():
    """A quoted verdict is one of tests/mistakes.toml. The bugs beside it are in the function that
    the verdict is about, or in one that works like it."""
    mistakes = tomllib.loads((ROOT / "tests" / "mistakes.toml").read_text(encoding="utf-8"))
    bugs = tomllib.loads((ROOT / "exercises" / "bugs.toml").read_text(encoding="utf-8"))["bug"]
    rows = re.findall(r'^\| "(.+)" \| ([\d, ]+) \| .+\? ?.*\|$', TEACHING, re.MULTILINE)
    assert len(rows) >= 12
    for verdict, numbers_of_bugs in rows:
        verdict = verdict.replace("\\|", "|")
        graded = {m["graded"] for m in mistakes["mistake"] if verdict in m["says"]}
        assert graded, verdict
        for number in numbers_of_bugs.split(", "):
            assert bugs[int(number) - 1]["function"] in graded | {
                "pad", "sequence_logps", "row_logps", "response_logps"}, verdict
    count = len(mistakes["mistake"])
    assert f"holds {count} such mistakes" in " ".join(TEACHING.split())
    patients = re.search(r"patients = (\{.*?\})", notebook(8))[1]
    order = ", ".join(re.findall(r"\d+", patients))
    assert f"the bugs {order}." in " ".join(TEACHING.split())
    points = tomllib.loads((ROOT / "exercises" / "points.toml").read_text(encoding="utf-8"))
    text, share = " ".join(TEACHING.split()), points["share"]
    assert f"gives {sum(points['points'].values())} points" in text
    assert (f"{share['right']:.0%} of a function's points for right numbers, {share['guards']:.0%} "
            f"for refusing what must be refused, {share['cost']:.0%} for doing nothing more"
            ).replace("%", " %") in text


def test_the_number_of_questions_is_todays():
    words = {80: "eighty"}
    assert f"has {words.get(len(ALL), len(ALL))} questions" in " ".join(TEACHING.split())
