"""The checks of the notebooks' exercises. Each takes the student's answer, prints what is right or what was probably done, and
returns whether it holds. An answer that is still `...` (or a function that returns it) is "not started".
"""
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import torch  # noqa: E402

import tabular  # noqa: E402
import world  # noqa: E402
from tools import assert_same  # noqa: E402


def check(function):
    """Turns a function that asserts into one that prints and returns a verdict."""
    def run(*answer):
        name = function.__name__.replace("_", " ")
        if any(a is ... or a is None for a in answer):
            print(f"{name}: not started.")
            return False
        try:
            function(*answer)
        except NotStarted:
            print(f"{name}: not started.")
        except AssertionError as error:
            print(f"{name}: not yet. {error}")
        except Exception as error:                       # the student's code failed on its own
            print(f"{name}: not yet. {type(error).__name__}: {error}")
        else:
            print(f"{name}: right.")
            return True
        return False
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


class NotStarted(Exception):
    pass


def ask(function, *args):
    value = function(*args)
    if value is ... or value is None:
        raise NotStarted
    return value


def small_world(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(5, generator=g, dtype=torch.float64), -1), 1.5 * torch.randn(5, generator=g, dtype=torch.float64)


# ---- 01 The RLHF objective and its optimum

@check
def exercise_1_1(objective):
    """objective(p, q, r, beta): Eq. 3 from lists of probabilities and rewards."""
    p, q, r = [0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [1.0, 0.0, -1.0]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q))
    other = sum(b * math.log(b / a) for a, b in zip(p, q))
    for beta in (0.5, 2.0):
        assert_same(ask(objective, p, q, r, beta), 0.6 - beta * kl, 1e-9, {
            "That is E[r] alone: the KL is missing.": 0.6, "The KL is added; Eq. 3 subtracts it.": 0.6 + beta * kl,
            "beta is missing before the KL.": 0.6 - kl, "That is KL(ref || pi): the expectation is under the policy.": 0.6 - beta * other,
            "The reward is averaged over responses, not over the policy.": 0 - beta * kl}, what=f"J at beta = {beta:g}")


@check
def exercise_1_2(optimal_policy):
    """optimal_policy(ref_logps, reward, beta) -> log-probabilities, without world.py's."""
    ref, reward = small_world()
    for beta in (0.5, 2.0):
        want = ref + reward / beta
        want = want - want.logsumexp(-1)
        got = ask(optimal_policy, ref, reward, beta)
        assert_same(got, want, 1e-9, {
            "It does not sum to 1: divide by Z, that is, subtract log Z.": ref + reward / beta,
            "beta stands the wrong way round: a larger beta keeps closer to the reference.": torch.log_softmax(ref + reward * beta, -1),
            "beta is missing: exp(r / beta).": torch.log_softmax(ref + reward, -1),
            "The reference is missing: that is a softmax of rewards.": torch.log_softmax(reward / beta, -1),
            "These are probabilities; wanted their logs.": want.exp()}, what=f"pi* at beta = {beta:g}")


@check
def exercise_1_3(reward_difference):
    """reward_difference(pi_logps, ref_logps, beta, i, j): what a policy says about r(i) - r(j)."""
    ref, reward = small_world(1)
    for beta in (0.5, 2.0):
        star = world.optimal_policy(ref, reward, beta)
        assert_same(ask(reward_difference, star, ref, beta, 3, 1), reward[3] - reward[1], 1e-9, {
            "beta is missing.": (reward[3] - reward[1]) / beta, "The sign is flipped.": reward[1] - reward[3],
            "The reference is missing: log pi* alone says how likely, not how good.": beta * (star[3] - star[1]),
            "log Z is in it once: in a difference of one prompt it cancels.":
                reward[3] - reward[1] - beta * world.log_partition(ref, reward, beta)}, what=f"r(3) - r(1) at beta = {beta:g}")


@check
def exercise_1_4(beta):
    """The beta at which pi* of this little world has KL 0.5 nats, to 1e-3."""
    ref, reward = small_world(2)
    kl = world.kl(world.optimal_policy(ref, reward, float(beta)), ref).item()
    assert abs(kl - 0.5) < 1e-3, (f"At beta = {beta:g} the KL is {kl:.4f} nats; wanted 0.5. "
                                  + ("Too tight a leash: a smaller beta." if kl < 0.5 else "Too long a leash: a larger beta."))


# ---- 03 Training a policy

@check
def exercise_3_1(accuracy):
    """accuracy(chosen_rewards, rejected_rewards): the share of pairs ranked as labelled, ties one half."""
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.0, -3.0, 1.0, 0.0])
    tied = ask(accuracy, torch.zeros(4), torch.zeros(4))
    assert_same(torch.as_tensor(tied).double(), 0.5, 1e-6, {
        "Ties count as wrong: at step 0 all pairs tie, and the accuracy must be 1/2.": 0.0,
        "Ties count as right: at step 0 all pairs tie, and the accuracy must be 1/2.": 1.0}, what="The accuracy of ties")
    assert_same(torch.as_tensor(ask(accuracy, chosen, rejected)).double(), 2.5 / 4, 1e-6, {
        "A sum; wanted the share of the pairs.": 2.5, "The sign is flipped: the chosen reward should be the larger.": 1.5 / 4},
        what="The accuracy of four pairs")


@check
def exercise_3_2(kl_from_rewards):
    """kl_from_rewards(chosen_rewards, rejected_rewards, beta): -mean of both rewards / beta."""
    ref, reward = small_world(3)
    pi = world.optimal_policy(ref, reward, 1.0)
    for beta in (0.5, 1.0):
        r = tabular.implicit_reward(pi, ref, beta)
        y = torch.arange(5)
        # every ordered pair as often as ref x ref draws it, in the end weighted exactly: 20,000 pairs in proportion
        counts = (20_000 * ref.exp()[:, None] * ref.exp()[None, :]).round().long()
        i, j = (t.expand(5, 5).flatten().repeat_interleave(counts.flatten()) for t in (y[:, None], y[None, :]))
        kl = -(torch.cat([r[i], r[j]]).mean() / beta)
        assert_same(torch.as_tensor(ask(kl_from_rewards, r[i], r[j], beta)).double(), kl, 1e-6, {
            "The sign is flipped: a KL is never negative.": -kl,
            "beta is still in it: rewards are beta times a log-ratio.": kl * beta,
            "That is the sum of the two means: the pair holds two samples; take the mean of both.": 2 * kl,
            "That is the margin: the KL is in the mean of the two.": (r[i] - r[j]).mean() / beta}, what=f"The KL at beta = {beta:g}")


@check
def exercise_3_3(missing_mass):
    """missing_mass(policy_logps, ref_logps) -> 1 - mean(pi/ref)."""
    pi, ref = torch.tensor([0.5, 0.1]).double(), torch.tensor([0.25, 0.4]).double()
    assert_same(torch.as_tensor(ask(missing_mass, pi.log(), ref.log())).double(), 1 - (pi / ref).mean(), 1e-9, {
        "The ratio is upside down: it is pi/ref, what the policy has left of what the reference writes.": 1 - (ref / pi).mean(),
        "exp of a mean; wanted the mean of exp.": 1 - (pi / ref).log().mean().exp(),
        "That is the mass that is still there; wanted what is missing, 1 minus it.": (pi / ref).mean(),
        "The ratio of means; wanted the mean of ratios.": 1 - pi.mean() / ref.mean(),
        "The policy's probability alone: divide by the reference's.": 1 - pi.mean()}, what="The missing mass")


# ---- 04 RLHF against DPO

@check
def exercise_4_1(token_rewards):
    """token_rewards(score, logps, ref_logps, beta): a reward for every token of one response; logps, ref_logps (T,)."""
    logps, ref = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([-1.5, -1.0, -0.75]).double()
    last, score = torch.tensor([0.0, 0.0, 1.0]).double(), 2.0
    for beta in (0.5, 2.0):
        penalty = beta * (logps - ref)
        assert_same(ask(token_rewards, score, logps, ref, beta), score * last - penalty, 1e-9, {
            "The KL is added; it is a penalty, so it is subtracted.": score * last + penalty,
            "beta is missing before the log-ratio.": score * last - (logps - ref),
            "The score stands at every token; it belongs to the last one alone.": score - penalty,
            "The score stands at the first token; it is given when the response is complete, at the last one.": score * last.flip(0) - penalty,
            "The score is missing: add it at the last token.": -penalty,
            "The last token pays its log-ratio too: the score is added to it, not put in its place.": score * last - penalty * (1 - last),
            "That is the sum; wanted a reward for every token.": score - penalty.sum()}, what=f"The rewards at beta = {beta:g}")


@check
def exercise_4_2(gae):
    """gae(rewards, values, lam) with gamma = 1, of one response; rewards, values (T,). After the last token the value is 0."""
    rewards, values = torch.tensor([-0.1, 0.2, 1.5]).double(), torch.tensor([0.4, -0.3, 0.8]).double()
    following = torch.tensor([-0.3, 0.8, 0.0]).double()

    def backwards(delta, lam):
        out, later = [], 0.0
        for d in reversed(delta.tolist()):
            later = d + lam * later
            out.append(later)
        return torch.tensor(out[::-1], dtype=torch.float64)
    delta = rewards + following - values
    to_go = backwards(rewards, 1.0)
    for lam in (0.0, 0.7, 1.0):
        assert_same(ask(gae, rewards, values, lam), backwards(delta, lam), 1e-9, {
            "These are the TD errors alone: add lam times the next advantage.": delta,
            "lam is missing: later TD errors count in full, which is right at lam = 1 only.": backwards(delta, 1.0),
            "The values are missing: that is a sum of rewards, not of TD errors.": backwards(rewards, lam),
            "That is the reward to go: subtract what the critic expected.": to_go,
            "The value of the next state is missing from the TD error, r + V' - V.": backwards(rewards - values, lam),
            "The TD error is r + V' - V; its V and V' are swapped.": backwards(rewards - following + values, lam),
            "After the last token there is nothing to come: its V' is 0.": backwards(rewards + torch.tensor([-0.3, 0.8, 0.8]).double() - values, lam),
            "It runs forwards: an advantage looks at what comes later, not at what was before.": backwards(delta.flip(0), lam).flip(0)},
            what=f"The advantages at lam = {lam:g}")


@check
def exercise_4_3(clipped_gain):
    """clipped_gain(ratio, advantage, clip): what PPO maximises, for every token; tensors of one shape."""
    ratio, advantage = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5] * 2).double(), torch.tensor([2.0] * 5 + [-3.0] * 5).double()
    for clip in (0.2, 0.3):
        plain, clipped = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
        assert_same(ask(clipped_gain, ratio, advantage, clip), torch.minimum(plain, clipped), 1e-9, {
            "Nothing is clipped: that is the ratio times the advantage.": plain,
            "Clipped on both sides: take the smaller of the clipped and the unclipped gain.": clipped,
            "The larger of the two; PPO takes the smaller, the pessimistic one.": torch.maximum(plain, clipped),
            "That is the loss; wanted the gain, without the minus.": -torch.minimum(plain, clipped),
            "The advantage is missing.": torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip))}, what=f"The gain at clip = {clip:g}")


@check
def exercise_4_4(baseline):
    """baseline(pi_logps, ref_logps, reward, beta): the mean of r - beta log(pi/ref) under pi, which is J(pi)."""
    ref, reward = small_world(4)
    for beta in (0.5, 2.0):
        pi = torch.log_softmax(ref + 0.4 * reward, -1)
        value = lambda p: world.expected(p, reward - beta * (pi - ref))
        assert_same(torch.as_tensor(ask(baseline, pi, ref, reward, beta)).double(), value(pi), 1e-9, {
            "That is E[r] alone: each response also pays beta log(pi/ref).": world.expected(pi, reward),
            "The KL is added; it is a penalty.": 2 * world.expected(pi, reward) - value(pi),
            "beta is missing.": world.expected(pi, reward - (pi - ref)),
            "The mean is over the reference; samples come from the policy.": value(ref),
            "Every response counts alike; weigh each with the policy's probability.": (reward - beta * (pi - ref)).mean(),
            "That is beta log Z, the best that any policy can expect; this policy, which is not pi*, expects less.":
                beta * world.log_partition(ref, reward, beta)}, what=f"The baseline at beta = {beta:g}")
        star = world.optimal_policy(ref, reward, beta)
        left = reward - beta * (star - ref) - ask(baseline, star, ref, reward, beta)
        assert left.abs().max() < 1e-9, "At pi* an advantage is not 0."


# ---- 08 Find the bug

def diagnose(number, answer, patient):
    """Assert that the answer names the function of bug `number`; then say what it was."""
    from exercises import find_the_bug                   # only here: it brings the whole project along
    this = find_the_bug.bug(number)
    where = find_the_bug.buggy_function(this)
    assert isinstance(answer, str) and "." in answer, f"Patient {patient}: name a function as a text, like \"train.fit\"."
    assert answer.split(".")[0] == where.split(".")[0], (
        f"Patient {patient}: {answer} is sound, and so is all of its file. What else stands between the data and what looks ill?")
    assert answer == where, f"Patient {patient}: the right file, but {answer} is sound. Which function there could do this?"
    print(f"Patient {patient}, {where}: {this['pitfall']} {this['why']}")


@check
def exercise_8_1(answer):
    """Patient A: chosen and rejected."""
    diagnose(34, answer, "A")


@check
def exercise_8_2(answer):
    """Patient B: it never stops."""
    diagnose(28, answer, "B")


@check
def exercise_8_3(answer):
    """Patient C: the same weights, other answers."""
    diagnose(41, answer, "C")


@check
def exercise_8_4(d, e, f):
    """Patients D, E, F: what no curve shows."""
    for number, answer, patient in ((15, d, "D"), (45, e, "E"), (38, f, "F")):
        diagnose(number, answer, patient)
