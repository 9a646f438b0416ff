"""Solutions of the notebooks' exercises. SPOILERS: try the exercises first.

exercises/checks.py checks these solutions as it checks yours.
"""
import math

import torch
import torch.nn.functional as F

import world
from exercises.checks import small_world
from lab import tabular

# ---- 01 The RLHF objective and its optimum

def objective(p, q, r, beta):
    reward = sum(a * c for a, c in zip(p, r))
    kl = sum(a * math.log(a / b) for a, b in zip(p, q))
    return reward - beta * kl


def optimal_policy(ref_logps, reward, beta):
    unnormalised = ref_logps + reward / beta  # (N,)
    return unnormalised - torch.logsumexp(unnormalised, -1)


def reward_difference(pi_logps, ref_logps, beta, i, j):
    log_ratio = pi_logps - ref_logps  # (N,)
    return beta * (log_ratio[i] - log_ratio[j])


def beta_for_half_a_nat():
    """The KL falls as beta grows. So halve an interval of log beta again and again."""
    low, high = 1e-3, 1e3
    ref, reward = small_world(2)
    for _ in range(60):
        middle = math.sqrt(low * high)
        if world.kl(world.optimal_policy(ref, reward, middle), ref) > 0.5:
            low = middle
        else:
            high = middle
    return middle


# ---- 03 Training a policy

def accuracy(chosen_rewards, rejected_rewards):
    right = chosen_rewards > rejected_rewards  # (B,)
    tied = chosen_rewards == rejected_rewards  # (B,)
    return (right + 0.5 * tied).mean()


def kl_from_rewards(chosen_rewards, rejected_rewards, beta):
    return -(chosen_rewards.mean() + rejected_rewards.mean()) / 2 / beta


def missing_mass(policy_logps, ref_logps):
    return 1 - (policy_logps - ref_logps).exp().mean()


# ---- 04 RLHF against DPO

def token_rewards(score, logps, ref_logps, beta):
    rewards = -beta * (logps - ref_logps)  # (T,)
    rewards[-1] += score
    return rewards


def gae(rewards, values, lam):
    advantages, advantage, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + next_value - values[t]
        advantage = delta + lam * advantage
        advantages[t] = advantage
        next_value = values[t]
    return advantages


def clipped_gain(ratio, advantage, clip):
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.minimum(ratio * advantage, clipped * advantage)


def baseline(pi_logps, ref_logps, reward, beta):
    return (pi_logps.exp() * (reward - beta * (pi_logps - ref_logps))).sum()


# ---- 05 One view of many losses

def rda_loss(h, reward_gap, beta):
    return (beta * h - reward_gap) ** 2 / 2


def pra_loss(h, p, beta):
    # F.logsigmoid does not overflow, as the logarithm of a sigmoid does
    return -p * F.logsigmoid(beta * h) - (1 - p) * F.logsigmoid(-beta * h)


def contraction(weights, beta, eta):
    eigenvalues = torch.linalg.eigvalsh(tabular.laplacian(weights))  # (N,), the smallest first
    return 1 - eta * beta ** 2 * eigenvalues[1]


def cdpo_margin(p, eps, beta):
    return torch.logit((1 - eps) * p + eps * (1 - p)) / beta


def undetermined(drawn):
    tied, responses = {0}, range(len(drawn))
    for _ in responses:  # no chain is longer than this
        tied |= {j for i in tied for j in responses if drawn[i, j] > 0}
    return [y for y in responses if y not in tied]


# ---- 06 The language model as a Q-function

def soft_value(ref_logps, q, beta):
    return beta * torch.logsumexp(ref_logps + q / beta, -1)


def rewards_from_tokens(token_logps, ref_token_logps, mask, beta):
    rewards = beta * (token_logps - ref_token_logps)  # (N, T)
    return torch.where(mask, rewards, 0.0).sum(-1)  # (N,)


def values_from_tokens(token_logps, ref_token_logps, beta, v0):
    return v0 + (beta * (token_logps - ref_token_logps)).cumsum(-1)  # (T,)


def culprit(values):
    return values.diff().argmin()


# ---- 07 The reference policy, and what goes wrong

def stray_mass(policy_probs, ref_probs, least):
    return torch.where(ref_probs < least, policy_probs, 0.0).sum(-1)  # (N,)


def chosen_change(ref_logps, reward, beta):
    chosen = tabular.preferred_ft(ref_logps, tabular.preferences(reward)).exp()  # (N,)
    change = world.optimal_policy(ref_logps, reward, beta) - ref_logps  # (N,)
    return (chosen * change).sum()


def distance(ref_logps, other_logps, reward, beta):
    return world.kl(world.optimal_policy(other_logps, reward, beta), ref_logps)


def best_of_n(n, proxy, worth):
    k = torch.arange(len(proxy) + 1).double() / len(proxy)  # (N+1,)
    # the best of n draws is among the k lowest with the probability (k/N)^n
    return ((k ** n).diff() * worth[proxy.argsort()]).sum()


# ---- 08 Find the bug: the functions that the bugs are in

PATIENTS = {"A": "data.collate", "B": "data.pad", "C": "model.GPT.hidden",
            "D": "losses.cdpo_loss", "E": "model.sample", "F": "world.kl"}
