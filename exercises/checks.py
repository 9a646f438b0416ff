"""The checks of the notebooks' exercises.

Each takes the student's answer, prints what is right or what was probably done, and returns
whether the answer holds. An answer that is still `...` is "not started". So is a function that
returns it.
"""
import functools
import math

import torch

import world
from exercises.compare import assert_same
from lab import tabular


class NotStarted(Exception):
    """The student's function still returns `...`."""


def check(function):
    """Turn a function that asserts into one that prints and returns a verdict."""
    name = function.__name__.replace("_", " ")

    @functools.wraps(function)
    def run(*answer):
        if any(a is ... or a is None for a in answer):
            print(f"{name}: not started.")
            return False
        try:
            function(*answer)
        except NotStarted:
            print(f"{name}: not started.")
        except AssertionError as error:
            print(f"{name}: not yet. {error}")
        except Exception as error:  # the student's own code failed
            print(f"{name}: not yet. {type(error).__name__}: {error}")
        else:
            print(f"{name}: right.")
            return True
        return False
    return run


def ask(function, *args):
    """What the student's function returns for these arguments."""
    value = function(*args)
    if value is ... or value is None:
        raise NotStarted
    return value


def ask_number(function, *args):
    """The same for a function that returns one number, as a float or as a tensor. float64"""
    return torch.as_tensor(ask(function, *args)).double()


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def small_world(seed=0):
    """(ref_logps, reward), each (5,): a world of five responses."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=generator, dtype=torch.float64)  # (5,)
    reward = 1.5 * torch.randn(5, generator=generator, dtype=torch.float64)  # (5,)
    return torch.log_softmax(logits, -1), reward


# ---- 01 The RLHF objective and its optimum

@check
def exercise_1_1(objective):
    """objective(p, q, r, beta): Eq. 3, from lists of probabilities and rewards."""
    p, q, r = [0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [1.0, 0.0, -1.0]
    reward = 0.6
    kl = sum(a * math.log(a / b) for a, b in zip(p, q))
    other_kl = sum(b * math.log(b / a) for a, b in zip(p, q))
    for beta in (0.5, 2.0):
        assert_same(ask(objective, p, q, r, beta), reward - beta * kl, 1e-9, {
            "That is E[r] alone: the KL is missing.": reward,
            "The KL is added. Eq. 3 subtracts it.": reward + beta * kl,
            "beta is missing before the KL.": reward - kl,
            "That is KL(ref || pi). In Eq. 3 the expectation is under the policy.":
                reward - beta * other_kl,
            "The reward is averaged over the responses. Average it over the policy.":
                sum(r) / 3 - beta * kl,
        }, what=f"J at beta = {beta:g}")


@check
def exercise_1_2(optimal_policy):
    """optimal_policy(ref_logps, reward, beta) -> log-probabilities, without world.py's."""
    ref, reward = small_world()
    for beta in (0.5, 2.0):
        unnormalised = ref + reward / beta  # (5,)
        want = unnormalised - unnormalised.logsumexp(-1)  # (5,)
        assert_same(ask(optimal_policy, ref, reward, beta), want, 1e-9, {
            "It does not sum to 1. Divide by Z: subtract log Z from the log-probabilities.":
                unnormalised,
            "beta stands the wrong way round: a larger beta keeps closer to the reference.":
                torch.log_softmax(ref + reward * beta, -1),
            "beta is missing: exp(r / beta).": torch.log_softmax(ref + reward, -1),
            "The reference is missing: that is a softmax of rewards.":
                torch.log_softmax(reward / beta, -1),
            "These are probabilities. Return their logarithms.": want.exp(),
        }, what=f"pi* at beta = {beta:g}")


@check
def exercise_1_3(reward_difference):
    """reward_difference(pi_logps, ref_logps, beta, i, j): what a policy says of r(i) - r(j)."""
    ref, reward = small_world(1)
    want = reward[3] - reward[1]
    for beta in (0.5, 2.0):
        star = world.optimal_policy(ref, reward, beta)  # (5,)
        log_z = world.log_partition(ref, reward, beta)
        assert_same(ask(reward_difference, star, ref, beta, 3, 1), want, 1e-9, {
            "beta is missing.": want / beta,
            "The sign is flipped.": -want,
            "The reference is missing: log pi* alone says how likely, not how good.":
                beta * (star[3] - star[1]),
            "It contains log Z once. In the difference of two rewards of one prompt it cancels.":
                want - beta * log_z,
        }, what=f"r(3) - r(1) at beta = {beta:g}")


@check
def exercise_1_4(beta):
    """The beta at which pi* of a small world has a KL of 0.5 nats, to 1e-3."""
    ref, reward = small_world(2)
    kl = world.kl(world.optimal_policy(ref, reward, float(beta)), ref).item()
    if abs(kl - 0.5) < 1e-3:
        return
    if kl < 0.5:
        advice = "The leash is too short: try a smaller beta."
    else:
        advice = "The leash is too long: try a larger beta."
    raise AssertionError(f"At beta = {beta:g} the KL is {kl:.4f} nats. Wanted is 0.5. {advice}")


# ---- 03 Training a policy

@check
def exercise_3_1(accuracy):
    """accuracy(chosen_rewards, rejected_rewards): the share of pairs ranked as labelled.

    A tie counts one half.
    """
    # In the first two pairs the chosen response is better, then the rejected one, then neither.
    chosen, rejected = vector(1.0, -2.0, 0.5, 0.0), vector(0.0, -3.0, 1.0, 0.0)
    right, ties = 2, 1
    assert_same(ask_accuracy(accuracy, torch.zeros(4), torch.zeros(4)), 0.5, 1e-6, {
        "A tie counts as wrong. At step 0 all pairs are ties, and the accuracy must be 1/2.": 0.0,
        "A tie counts as right. At step 0 all pairs are ties, and the accuracy must be 1/2.": 1.0,
    }, what="The accuracy of ties")
    assert_same(ask_accuracy(accuracy, chosen, rejected), (right + 0.5 * ties) / 4, 1e-6, {
        "That is a sum. Divide by the number of pairs.": right + 0.5 * ties,
        "The sign is flipped: the chosen reward should be the larger one.": (1 + 0.5 * ties) / 4,
    }, what="The accuracy of four pairs")


def ask_accuracy(accuracy, chosen, rejected):
    """`ask_number`, but with a message of our own for the mean of booleans."""
    try:
        return ask_number(accuracy, chosen, rejected)
    except RuntimeError as error:
        if "Bool" not in str(error):
            raise
        raise AssertionError(
            "chosen_rewards > rejected_rewards is a tensor of booleans, and PyTorch takes no mean "
            "of booleans. Make numbers of them first: (chosen_rewards > rejected_rewards)"
            ".float().mean(). And let a tie count one half.") from None


@check
def exercise_3_2(kl_from_rewards):
    """kl_from_rewards(chosen_rewards, rejected_rewards, beta): -mean of all rewards / beta."""
    ref, reward = small_world(3)
    pi = world.optimal_policy(ref, reward, 1.0)  # (5,)
    # About 20,000 pairs (i, j): each as often as two samples of the reference make it.
    counts = (20_000 * ref.exp()[:, None] * ref.exp()[None, :]).round().long()  # (5, 5)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))  # (25, 2)
    pairs = pairs.repeat_interleave(counts.flatten(), dim=0)  # (N, 2)
    i, j = pairs[:, 0], pairs[:, 1]  # (N,), (N,)
    for beta in (0.5, 1.0):
        r = tabular.implicit_reward(pi, ref, beta)  # (5,)
        mean = torch.cat([r[i], r[j]]).mean()
        kl = -mean / beta
        assert_same(ask_number(kl_from_rewards, r[i], r[j], beta), kl, 1e-6, {
            "The sign is flipped: a KL is never negative.": -kl,
            "beta is still in it. The rewards are beta times a log-ratio, so divide by beta.":
                -mean,
            "It is multiplied by beta. The rewards contain beta already, so divide by beta.":
                -mean * beta,
            "That is the sum of two means. A pair holds two samples: take the mean of both.":
                2 * kl,
            "That is the margin. The KL is in the mean of the two rewards.":
                (r[i] - r[j]).mean() / beta,
        }, what=f"The KL at beta = {beta:g}")


@check
def exercise_3_3(missing_mass):
    """missing_mass(policy_logps, ref_logps) -> 1 - mean(pi/ref)."""
    pi, ref = vector(0.5, 0.1), vector(0.25, 0.4)
    there = (pi / ref).mean()
    assert_same(ask_number(missing_mass, pi.log(), ref.log()), 1 - there, 1e-9, {
        "The ratio is upside down. It is pi/ref: what is left of the reference's text.":
            1 - (ref / pi).mean(),
        "That is the exp of a mean. Take the mean of the exp.": 1 - (pi / ref).log().mean().exp(),
        "That is the mass that is still there. Return what is missing: 1 minus it.": there,
        "That is the ratio of means. Take the mean of the ratios.": 1 - pi.mean() / ref.mean(),
        "That uses the policy's probability alone. Divide it by the reference's.": 1 - pi.mean(),
    }, what="The missing mass")


# ---- 04 RLHF against DPO

@check
def exercise_4_1(token_rewards):
    """token_rewards(score, logps, ref_logps, beta): a reward for each token of one response.

    logps, ref_logps (T,).
    """
    logps, ref = vector(-1.0, -2.0, -0.5), vector(-1.5, -1.0, -0.75)  # (T,)
    first, last, score = vector(1, 0, 0), vector(0, 0, 1), 2.0
    for beta in (0.5, 2.0):
        penalty = beta * (logps - ref)  # (T,)
        want = score * last - penalty  # (T,)
        assert_same(ask(token_rewards, score, logps, ref, beta), want, 1e-9, {
            "The KL is added. It is a penalty, so subtract it.": score * last + penalty,
            "beta is missing before the log-ratio.": score * last - (logps - ref),
            "The score stands at every token. It belongs to the last token alone.":
                score - penalty,
            "The score stands at the first token. It is given at the last one, when the response "
            "is complete.": score * first - penalty,
            "The score is missing. Add it at the last token.": -penalty,
            "The last token pays its log-ratio too: the score is added to it, not put in its "
            "place.": score * last - penalty * (1 - last),
            "That is the sum. Return a reward for every token.": score - penalty.sum(),
        }, what=f"The rewards at beta = {beta:g}")


@check
def exercise_4_2(gae):
    """gae(rewards, values, lam) of one response, with gamma = 1. rewards, values (T,).

    After the last token the value is 0.
    """
    rewards, values = vector(-0.1, 0.2, 1.5), vector(0.4, -0.3, 0.8)  # (T,)
    next_values = vector(-0.3, 0.8, 0.0)  # (T,)
    never_zero = vector(-0.3, 0.8, 0.8)  # (T,): next_values of someone who overlooks the end
    delta = rewards + next_values - values  # (T,)
    for lam in (0.0, 0.7, 1.0):
        assert_same(ask(gae, rewards, values, lam), backwards(delta, lam), 1e-9, {
            "These are the TD errors alone. Add lam times the next advantage.": delta,
            "lam is missing. Later TD errors count in full only at lam = 1.":
                backwards(delta, 1.0),
            "The values are missing: that is a sum of rewards, not of TD errors.":
                backwards(rewards, lam),
            "That is the reward to go. Subtract what the critic expected.":
                backwards(rewards, 1.0),
            "The value of the next state is missing from the TD error, r + V' - V.":
                backwards(rewards - values, lam),
            "The TD error is r + V' - V. Its V and V' are swapped.":
                backwards(rewards - next_values + values, lam),
            "After the last token nothing comes: its V' is 0.":
                backwards(rewards + never_zero - values, lam),
            "It runs forwards. An advantage looks at what comes later, not at what came before.":
                backwards(delta.flip(0), lam).flip(0),
        }, what=f"The advantages at lam = {lam:g}")


def backwards(delta, lam):
    """A_t = delta_t + lam A_{t+1}. (T,) -> (T,)"""
    advantages, later = [], 0.0
    for d in reversed(delta.tolist()):
        later = d + lam * later
        advantages.insert(0, later)
    return vector(*advantages)


@check
def exercise_4_3(clipped_gain):
    """clipped_gain(ratio, advantage, clip): what PPO maximises for each token.

    ratio, advantage: tensors of one shape.
    """
    ratio = vector(0.5, 0.9, 1.0, 1.1, 1.5).repeat(2)  # (10,)
    advantage = vector(2.0, -3.0).repeat_interleave(5)  # (10,)
    for clip in (0.2, 0.3):
        near = ratio.clamp(1 - clip, 1 + clip)  # (10,)
        plain, clipped = ratio * advantage, near * advantage  # (10,), (10,)
        gain = torch.minimum(plain, clipped)  # (10,)
        assert_same(ask(clipped_gain, ratio, advantage, clip), gain, 1e-9, {
            "Nothing is clipped: that is the ratio times the advantage.": plain,
            "It is clipped on both sides. Take the smaller one of the clipped and the unclipped "
            "gain.": clipped,
            "That is the larger one of the two. PPO takes the smaller, the pessimistic one.":
                torch.maximum(plain, clipped),
            "That is the loss. Return the gain, without the minus.": -gain,
            "The advantage is missing.": torch.minimum(ratio, near),
        }, what=f"The gain at clip = {clip:g}")


@check
def exercise_4_4(baseline):
    """baseline(pi_logps, ref_logps, reward, beta): the mean of r - beta log(pi/ref) under pi.

    That is J(pi).
    """
    ref, reward = small_world(4)
    for beta in (0.5, 2.0):
        pi = torch.log_softmax(ref + 0.4 * reward, -1)  # (5,)
        weight = reward - beta * (pi - ref)  # (5,)
        objective = world.expected(pi, weight)
        log_z = world.log_partition(ref, reward, beta)
        assert_same(ask_number(baseline, pi, ref, reward, beta), objective, 1e-9, {
            "That is E[r] alone. Each response also pays beta log(pi/ref).":
                world.expected(pi, reward),
            "The KL is added. It is a penalty, so subtract it.":
                world.expected(pi, reward + beta * (pi - ref)),
            "beta is missing.": world.expected(pi, reward - (pi - ref)),
            "The mean is over the reference. The samples come from the policy.":
                world.expected(ref, weight),
            "Every response counts alike. Weigh each with the policy's probability.":
                weight.mean(),
            "That is beta log Z, the best that any policy can expect. This policy is not pi*, so "
            "it expects less.": beta * log_z,
        }, what=f"The baseline at beta = {beta:g}")
        star = world.optimal_policy(ref, reward, beta)  # (5,)
        at_star = ask(baseline, star, ref, reward, beta)
        advantages = reward - beta * (star - ref) - at_star  # (5,)
        assert advantages.abs().max() < 1e-9, "At pi* an advantage is not 0."


# ---- 05 One view of many losses

@check
def exercise_5_1(rda_loss):
    """rda_loss(h, reward_gap, beta): (beta h - (r_i - r_j))^2 / 2 of each pair. (B,), (B,)"""
    h, gap = vector(0.5, -1.0, 2.0, 0.0), vector(1.0, 0.5, -0.7, 2.0)  # (B,), (B,)
    for beta in (0.5, 2.0):
        error = beta * h - gap  # (B,)
        want = error ** 2 / 2  # (B,)
        assert_same(ask(rda_loss, h, gap, beta), want, 1e-9, {
            "The factor 1/2 is missing.": error ** 2,
            "Nothing is squared: a pair can be made as negative as one likes.":
                [error, error / 2],
            "That is half the distance. Square it.": [error.abs(), error.abs() / 2],
            "beta is missing before h.": (h - gap) ** 2 / 2,
            "beta stands outside. It belongs to h alone: the reward gap has its unit already.":
                [beta * (h - gap) ** 2 / 2, (beta * (h - gap)) ** 2 / 2],
            "The gap is added. Subtract it: the loss must be 0 where beta h is the gap.":
                (beta * h + gap) ** 2 / 2,
            "That is one number. Return the loss of each pair.": [want.mean(), want.sum()],
        }, what=f"The loss at beta = {beta:g}")


@check
def exercise_5_2(pra_loss):
    """pra_loss(h, p, beta): -p log s(beta h) - (1-p) log s(-beta h) of each pair. (B,), (B,)"""
    h, p = vector(0.5, -1.0, 2.0, 0.3), vector(0.7, 0.2, 0.55, 0.9)  # (B,), (B,)
    for beta in (0.5, 2.0):
        win, lose = torch.sigmoid(beta * h), torch.sigmoid(-beta * h)  # (B,), (B,)
        want = -p * win.log() - (1 - p) * lose.log()  # (B,)
        assert_same(ask(pra_loss, h, p, beta), want, 1e-9, {
            "That is DPO's loss of one label, and p is not in it. The other label comes with "
            "probability 1 - p.": -win.log(),
            "The second term is missing: with probability 1 - p the other response is preferred.":
                -p * win.log(),
            "The two probabilities are swapped: p belongs to log s(beta h).":
                -(1 - p) * win.log() - p * lose.log(),
            "beta is missing.":
                -p * torch.sigmoid(h).log() - (1 - p) * torch.sigmoid(-h).log(),
            "That is the log-likelihood. The loss is minus it.": -want,
            "The second term is added with the wrong sign. Both terms count against the policy.":
                -p * win.log() + (1 - p) * lose.log(),
            "The logarithms are missing.": [-p * win - (1 - p) * lose, p * win + (1 - p) * lose],
            "That is the logarithm of a mean. Take the mean of the logarithms.":
                -(p * win + (1 - p) * lose).log(),
            "That is one number. Return the loss of each pair.": [want.mean(), want.sum()],
        }, what=f"The loss at beta = {beta:g}")


@check
def exercise_5_3(contraction):
    """contraction(weights, beta, eta): 1 - eta beta^2 lambda_2 of a graph's Laplacian.

    weights (N,N): of the comparison graph, symmetric, 0 on the diagonal.
    """
    ref, reward = small_world(5)
    weights = 2 * ref.exp()[:, None] * ref.exp()[None, :]  # (5, 5)
    slope = torch.sigmoid(reward[:, None] - reward[None, :])  # (5, 5)
    weights = (weights * slope * (1 - slope)).fill_diagonal_(0)  # (5, 5)
    eigenvalues = torch.linalg.eigvalsh(tabular.laplacian(weights))  # (5,), the smallest first
    second, largest = eigenvalues[1], eigenvalues[-1]
    for beta, eta in ((0.5, 2.0), (1.5, 0.7)):
        rate = eta * beta ** 2  # what multiplies an eigenvalue
        want = 1 - rate * second
        assert_same(ask_number(contraction, weights, beta, eta), want, 1e-9, {
            "That is the fastest direction, of the largest eigenvalue. The slowest one decides.":
                1 - rate * largest,
            "The smallest eigenvalue is 0: it belongs to a shift of all logits, which changes no "
            "policy. Take the second smallest.": 1 - rate * eigenvalues[0],
            "beta is squared in the Hessian.": 1 - eta * beta * second,
            "beta is missing.": 1 - eta * second,
            "eta is missing.": 1 - beta ** 2 * second,
            "That is what a step takes away. Return what it leaves: 1 minus it.": rate * second,
            "These are eigenvalues of the weights. Take those of the Laplacian.":
                [1 - rate * e for e in torch.linalg.eigvalsh(weights)],
        }, what=f"The factor at beta = {beta:g}, eta = {eta:g}")


@check
def exercise_5_4(cdpo_margin):
    """cdpo_margin(p, eps, beta): the h at which cDPO's expected loss of a pair is smallest.

    p (B,): the share of the labels that prefer the first response. Each is above 0 and below 1.
    """
    p = vector(0.2, 0.6, 0.9)  # (B,)
    for eps, beta in ((0.1, 0.5), (0.3, 2.0)):
        mixed = (1 - eps) * p + eps * (1 - p)  # (B,)
        want = torch.logit(mixed) / beta  # (B,)
        unmixed = torch.logit(((p - eps) / (1 - 2 * eps)).clamp(0.01, 0.99)) / beta  # (B,)
        assert_same(ask(cdpo_margin, p, eps, beta), want, 1e-9, {
            "That is where DPO stops: eps is missing.": torch.logit(p) / beta,
            "That is beta h. Divide it by beta.": torch.logit(mixed),
            "It is multiplied by beta. cDPO fixes beta h, so divide by beta.":
                beta * torch.logit(mixed),
            "That is the probability that the policy should believe in. Return the h that gives "
            "it: its log-odds, divided by beta.": [mixed, mixed / beta],
            "The sign is flipped.": -want,
            "That is the largest margin, of a pair with p = 1. Here p is smaller.":
                math.log((1 - eps) / eps) / beta * torch.ones_like(p),
            "That takes flips away, as robust DPO does. cDPO adds them to the labels.": unmixed,
        }, what=f"h at eps = {eps:g}, beta = {beta:g}")


@check
def exercise_5_5(undetermined):
    """undetermined(drawn): a list of the responses that no chain of comparisons ties to response 0.

    drawn (N,N): how often two responses are compared, symmetric.
    """
    graphs = (6, [(0, 1), (1, 2), (3, 4)]), (6, [(0, 4), (4, 5), (5, 2), (1, 3)]), (3, [(0, 2)])
    for n, edges in graphs:
        drawn = torch.zeros(n, n, dtype=torch.float64)
        for i, j in edges:
            drawn[i, j] = drawn[j, i] = 0.1
        responses = range(n)
        tied, one_sweep = {0}, {0}
        for _ in responses:  # no chain is longer than this
            tied |= {j for i in tied for j in responses if drawn[i, j] > 0}
        for j in responses:
            if any(drawn[i, j] > 0 for i in one_sweep):
                one_sweep.add(j)
        want = [y for y in responses if y not in tied]
        mistakes = {
            "Response 0 is in the list, but its log-ratio to itself is known: it is 0.": [0, *want],
            "These are the responses that are determined. The others were asked for.":
                sorted(tied),
            "A chain of comparisons ties two responses too. You looked at one comparison only.":
                [y for y in responses if y > 0 and drawn[0, y] == 0],
            "A chain can have more links. You went through the responses once.":
                [y for y in responses if y not in one_sweep],
            "A response can be compared and still be free: if it is compared only with responses "
            "that no chain ties to response 0.": [y for y in responses if not drawn[y].any()],
        }
        got = sorted(int(y) for y in ask(undetermined, drawn))
        if got == want:
            continue
        for message, value in mistakes.items():
            assert got != value, f"The comparisons are {edges}. {message}"
        raise AssertionError(f"The comparisons of {n} responses are {edges}. Wanted is {want}, "
                             f"you have {got}.")


# ---- 06 The language model as a Q-function

@check
def exercise_6_1(soft_value):
    """soft_value(ref_logps, q, beta): V of a state, from the Q of its next tokens. (N,), (N,)"""
    ref, q = small_world(5)
    for beta in (0.5, 2.0):
        want = beta * torch.logsumexp(ref + q / beta, -1)
        assert_same(ask_number(soft_value, ref, q, beta), want, 1e-9, {
            "That is the mean of Q. It is the value for a policy that stays the reference. Take "
            "the mean of exp(Q/beta), then beta times its logarithm.": (ref.exp() * q).sum(),
            "That is the largest Q. It is the value without a leash, at beta = 0.": q.max(),
            "The reference is missing: weigh each token with its probability.":
                beta * torch.logsumexp(q / beta, -1),
            "beta is missing in front of the logarithm. Without it V has no unit of reward.":
                want / beta,
            "beta is missing. Q is divided by it, and the logarithm is multiplied by it.":
                torch.logsumexp(ref + q, -1),
            "beta stands the wrong way round: Q is divided by it.":
                torch.logsumexp(ref + q * beta, -1) / beta,
            "That is the policy of the state. Return its value, one number.":
                ref + (q - want) / beta,
        }, what=f"V at beta = {beta:g}")


@check
def exercise_6_2(rewards_from_tokens):
    """rewards_from_tokens(token_logps, ref_token_logps, mask, beta) -> r - V(s_0) of N responses.

    All three are (N, T). mask is true where a response has a token.
    """
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()  # (3, 3)
    logps = -vector(1.0, 0.5, 2.0, 0.25, 1.5, 9.0, 3.0, 8.0, 7.0).view(3, 3)
    ref = -vector(2.0, 0.25, 1.0, 1.0, 1.0, 4.0, 2.5, 6.0, 7.5).view(3, 3)
    for beta in (0.5, 2.0):
        ratio = beta * (logps - ref)  # (3, 3)
        inside = ratio * mask  # (3, 3)
        want = inside.sum(-1)  # (3,)
        assert_same(ask(rewards_from_tokens, logps, ref, mask, beta), want, 1e-9, {
            "The padding counts too. Leave out what is behind the end of a response.":
                ratio.sum(-1),
            "It is a mean. The rewards of the tokens add up: take the sum.":
                want / mask.sum(-1),
            "It is a mean over the padded length. Take the sum.": inside.mean(-1),
            "beta is missing.": want / beta,
            "The sign is flipped: the policy is above, the reference is below.": -want,
            "The reference is missing. log pi alone says how likely, not how good.":
                (beta * logps * mask).sum(-1),
            "Return one number for each response: add up over its tokens.": [inside, ratio],
            "That is the sum over all responses. Return one number for each.": want.sum(),
        }, what=f"The rewards at beta = {beta:g}")


@check
def exercise_6_3(values_from_tokens):
    """values_from_tokens(token_logps, ref_token_logps, beta, v0): V after each token of a response.

    token_logps, ref_token_logps (T,). v0 is V(s_0).
    """
    logps, ref, v0 = -vector(1.0, 0.5, 2.0, 0.25), -vector(2.0, 0.25, 1.0, 1.0), 0.75
    for beta in (0.5, 2.0):
        ratio = beta * (logps - ref)  # (T,)
        want = v0 + ratio.cumsum(0)  # (T,)
        assert_same(ask(values_from_tokens, logps, ref, beta, v0), want, 1e-9, {
            "V(s_0) is missing. The sums are the changes of the value since the beginning.":
                want - v0,
            "Only the last token is added. The value has changed at every token before it, too.":
                v0 + ratio,
            "It runs backwards. A prefix has the tokens up to here, not those that come later.":
                [v0 + ratio.flip(0).cumsum(0).flip(0), v0 + ratio.flip(0).cumsum(0)],
            "beta is missing.": v0 + ratio.cumsum(0) / beta,
            "The sign is flipped: the policy is above, the reference is below.":
                v0 - ratio.cumsum(0),
            "That is V of the whole response alone. Return a value after every token.":
                want[-1],
            "It begins before the first token. Return the value after each token.":
                [torch.cat([vector(v0), want]), torch.cat([vector(v0), want[:-1]])],
        }, what=f"The values at beta = {beta:g}")


@check
def exercise_6_4(culprit):
    """culprit(values): the place of the token that loses most value. values (T+1,), V(s_0) first.

    Places count from 0.
    """
    first = vector(0.0, -1.2, -0.9, -1.3, -1.8, -1.7, 0.3, -0.6)  # (T+1,)
    for values in (first, torch.cat([vector(0.1, 0.4), first + 0.9])):
        change = values.diff()  # (T,)
        want, lowest = change.argmin(), values.argmin()
        assert_same(ask_number(culprit, values), want.double(), 1e-9, {
            "There the value is lowest. Look for the largest step down.": lowest,
            "After this token the value is lowest. Look for the largest step down.": lowest - 1,
            "It is off by one: token t leads from values[t] to values[t + 1]. Return t.": want + 1,
            "There the value rises most. Look for the largest fall.": change.argmax(),
            "That is how much is lost. Return the place of the token.": [change.min(),
                                                                         -change.min()],
        }, what="The place of the token")


# ---- 07 The reference policy, and what goes wrong

@check
def exercise_7_1(stray_mass):
    """stray_mass(policy_probs, ref_probs, least): what the policy gives to unlikely tokens. (N,)

    policy_probs, ref_probs (N, V). Unlikely is what the reference gives less than `least`.
    """
    policy = vector(0.1, 0.3, 0.2, 0.4, 0.55, 0.05, 0.15, 0.25).view(2, 4)
    ref = vector(0.6, 0.25, 0.1, 0.05, 0.05, 0.3, 0.25, 0.4).view(2, 4)
    for least in (0.25, 0.5):
        likely = ref >= least  # (2, 4)
        kept = torch.where(likely, policy, 0.0)  # (2, 4)
        want = (policy - kept).sum(-1)  # (2,)
        assert_same(ask(stray_mass, policy, ref, least), want, 1e-9, {
            "That is the mass on the likely tokens. Return the rest.": kept.sum(-1),
            "The policy decides there what is unlikely. The reference has to decide.":
                torch.where(policy < least, policy, 0.0).sum(-1),
            "That is the reference's own mass on its unlikely tokens. Add up the policy's.":
                torch.where(likely, 0.0, ref).sum(-1),
            "That is how many tokens are unlikely. Add up their probabilities.":
                (~likely).double().sum(-1),
            "That is a mean over the vocabulary. Take the sum.": (policy - kept).mean(-1),
            "That is one number for all beginnings. Return one for each.": [want.sum(),
                                                                            want.mean()],
            "A token to which the reference gives exactly `least` is likely.":
                torch.where(ref <= least, policy, 0.0).sum(-1),
        }, what=f"The stray mass for least = {least:g}")


@check
def exercise_7_2(chosen_change):
    """chosen_change(ref_logps, reward, beta): E[log pi*(y_w) - log ref(y_w)], pairs from ref."""
    ref, reward = small_world(6)
    preference = torch.sigmoid(reward[:, None] - reward[None, :])  # (5, 5)
    won = 2 * ref.exp() * (preference @ ref.exp())  # (5,): p_w
    lost = 2 * ref.exp() * (preference.T @ ref.exp())  # (5,): p_l
    for beta in (0.5, 2.0):
        unnormalised = reward / beta  # (5,)
        change = unnormalised - (ref + unnormalised).logsumexp(-1)  # (5,): log pi*/ref
        want = (won * change).sum()
        assert_same(ask_number(chosen_change, ref, reward, beta), want, 1e-9, {
            "log Z is missing: pi* has to sum to 1.": (won * unnormalised).sum(),
            "beta is missing: exp(r / beta).":
                (won * (reward - (ref + reward).logsumexp(-1))).sum(),
            "That is the mean over the reference. A chosen response is drawn more often where it "
            "is good: use preferred_ft.": (ref.exp() * change).sum(),
            "That is the mean over pi*, which is its KL. The pairs come from the reference.":
                ((ref + change).exp() * change).sum(),
            "That is the change of the rejected responses.": (lost * change).sum(),
            "The sign is flipped: the policy minus the reference.": -want,
            "That is a change of the reward. Leave out the beta in front.": beta * want,
            "That is log pi*. Subtract log ref.": (won * (ref + change)).sum(),
            "Return one number: the mean over the chosen responses.": change,
        }, what=f"The change at beta = {beta:g}")


@check
def exercise_7_3(distance):
    """distance(ref_logps, other_logps, reward, beta): KL(target of DPO with `other` || ref)."""
    ref, reward = small_world(7)
    other, _ = small_world(8)

    def target(reference, beta):
        unnormalised = reference + reward / beta  # (5,)
        return unnormalised - unnormalised.logsumexp(-1)  # (5,)

    def kl(p, q):
        return (p.exp() * (p - q)).sum()

    for beta in (0.5, 2.0):
        aim = target(other, beta)  # (5,)
        assert_same(ask_number(distance, ref, other, reward, beta), kl(aim, ref), 1e-9, {
            "That is the KL to the other reference. How far is it from the original one?":
                kl(aim, other),
            "The other reference has no effect there. It stands in the target.":
                kl(target(ref, beta), ref),
            "The original reference stands in the target, and the other one in the KL. It is the "
            "other way round.": kl(target(ref, beta), other),
            "That is KL(ref || target). The expectation is under the target.": kl(ref, aim),
            "The reward has no effect there: that is the KL between the two references.":
                [kl(other, ref), kl(ref, other)],
            "beta is missing: exp(r / beta).": kl(target(other, 1.0), ref),
            "beta stands the wrong way round: exp(r / beta).": kl(target(other, 1 / beta), ref),
            "The target does not sum to 1. Subtract log Z.":
                kl(other + reward / beta, ref),
            "That is beta times the KL. Return the KL, in nats.": beta * kl(aim, ref),
        }, what=f"The KL at beta = {beta:g}")


@check
def exercise_7_4(best_of_n):
    """best_of_n(n, proxy, worth): the expected worth of the draw that the proxy likes best.

    n draws, with replacement, from N samples: proxy (N,), worth (N,).
    """
    proxy = vector(0.3, -1.0, 2.0, 1.2, -0.4)
    worth = vector(1.0, 0.0, -3.0, 2.5, 0.5)

    def by(key, n, of):
        order = key.argsort()  # from the lowest to the highest
        k = torch.arange(1, 6).double() / 5
        return ((k ** n - (k - 0.2) ** n) * of[order]).sum()

    for n in (1, 2, 3):
        known = {} if n == 1 else {
            "The worth decides there which draw is kept. The proxy has to decide.":
                by(worth, n, worth),
            "That is the proxy of the kept draw. Return its worth.": by(proxy, n, proxy),
            "The worst of the draws is kept. Keep the one with the highest proxy.":
                by(-proxy, n, worth),
            "n has no effect there: that is the mean of all samples.": worth.mean(),
            "The samples are not sorted by the proxy.":
                by(torch.arange(5).double(), n, worth),
            "That is the worth of the best sample of all. It is not among every n draws.":
                worth[proxy.argmax()],
        }
        assert_same(ask_number(best_of_n, n, proxy, worth), by(proxy, n, worth), 1e-6, known,
                    what=f"The worth of the best of {n}")


# ---- 08 Find the bug

def diagnose(number, answer, patient):
    """Assert that the answer names the function that bug `number` is in. Then explain the bug."""
    from exercises import find_the_bug  # only here: it brings the whole project along
    this = find_the_bug.bug(number)
    where = find_the_bug.buggy_function(this)
    assert isinstance(answer, str) and "." in answer, (
        f"Patient {patient}: write the name of a function as a text, like \"train.train_dpo\".")
    assert answer.split(".")[0] == where.split(".")[0], (
        f"Patient {patient}: {answer} is sound, and so is all of its file. What else stands "
        "between the data and what looks ill?")
    assert answer == where, (
        f"Patient {patient}: this is the right file, but {answer} is sound. Which function there "
        "could do this?")
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
