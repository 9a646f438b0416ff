"""Reinforcement learning on the same objective: the policy gradient and its baselines, estimates of the KL, mirror descent.
Every expectation is a sum over all responses, and every gradient with respect to the logits of a tabular policy is compared
with autograd of the exact quantity. float64, 1e-10 unless stated. (Claims 33 to 35, on PPO's clip, GAE and REINFORCE++, come
with the code that they are about.)"""
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import tabular
import world
from tools import betas, assert_same, vector, worlds


def exact_gradient(f, logits):
    """The gradient of f(log-probabilities) with respect to the logits, by autograd of the exact quantity."""
    theta = logits.clone().requires_grad_()
    return torch.autograd.grad(f(torch.log_softmax(theta, -1)), theta)[0]


def score(logps):
    """grad log pi(y) with respect to the logits, all y: row y is e_y - pi. (N, N)"""
    return torch.eye(len(logps), dtype=torch.float64) - logps.exp()


@given(worlds(policies=1), betas, st.floats(-30, 30))
def test_the_policy_gradient_with_any_baseline(drawn, beta, baseline):
    """Claim 31. grad J = E_pi[(r - beta log(pi/ref) - b) grad log pi] for any baseline b: the KL's own gradient needs no
    term of its own, and b changes only the variance."""
    ref, reward, pi = drawn
    advantage = reward - tabular.implicit_reward(pi, ref, beta) - baseline                            # (N,)
    estimate = (pi.exp() * advantage) @ score(pi)
    want = exact_gradient(lambda logps: tabular.objective(logps, ref, reward, beta), pi)
    assert_same(estimate, want, 1e-11 * max(1, advantage.abs().max().item()), {
        "the KL penalty is missing from the reward": (pi.exp() * (reward - baseline)) @ score(pi)}, what="the policy gradient")


@given(worlds(policies=1))
def test_kl_estimators_and_their_gradients(drawn):
    """Claim 32. On samples of pi: E k1 = E k3 = KL(pi || ref), while E k2 is not; but as losses, E grad k1 = 0,
    E grad k2 = grad KL(pi || ref) and E grad k3 = grad KL(ref || pi): a good estimate of a KL is not a good loss."""
    ref, _, pi = drawn
    p = pi.exp()
    k1, k2, k3 = tabular.kl_estimators(pi, ref)
    kl = math.fsum(a * (b - c) for a, b, c in zip(p.tolist(), pi.tolist(), ref.tolist()))
    scale = max(1.0, (ref - pi).exp().max().item())                 # k3 holds ref/pi, which may be e^20
    assert_same((p * k1).sum(), vector(kl)[0], 1e-10, what="E k1")
    assert_same((p * k3).sum(), vector(kl)[0], 1e-10, {"the k1 in k3 has the wrong sign": (p * (k3 - 2 * k1)).sum()}, what="E k3")
    assert (k3 >= -1e-12).all(), "k3 is never negative, for any sample"

    def expected_gradient(k):                        # E_{y~pi}[grad k(y)], the sampling not differentiated
        return exact_gradient(lambda logps: (p * tabular.kl_estimators(logps, ref)[k]).sum(), pi)
    zero = torch.zeros_like(pi)
    assert_same(expected_gradient(0), zero, 1e-12, what="E grad k1")
    assert_same(expected_gradient(1), exact_gradient(lambda logps: world.kl(logps, ref), pi), 1e-10, what="E grad k2")
    assert_same(expected_gradient(2), exact_gradient(lambda logps: world.kl(ref, logps), pi), 1e-14 * scale + 1e-10, {
        "this is grad KL(pi || ref)": exact_gradient(lambda logps: world.kl(logps, ref), pi)}, what="E grad k3")


def test_k2_is_biased():
    """Claim 32, the other half: for one policy E k2 is worked by hand and is not the KL. pi = (3/4, 1/4), ref = (1/2, 1/2)."""
    pi, ref = vector(3 / 4, 1 / 4).log(), vector(1 / 2, 1 / 2).log()
    a, b = math.log(3 / 2), math.log(1 / 2)
    _, k2, _ = tabular.kl_estimators(pi, ref)
    assert_same((pi.exp() * k2).sum(), vector((3 * a * a + b * b) / 8)[0], 1e-12, {"the half is missing": vector((3 * a * a + b * b) / 4)[0]},
         what="E k2")
    assert abs((pi.exp() * k2).sum() - world.kl(pi, ref)) > 1e-3


@given(worlds(), betas, st.lists(st.floats(0.05, 1), min_size=1, max_size=6), st.floats(-5, 5))
def test_mirror_descent_from_the_reference_lands_on_the_optimum(drawn, beta, steps, baseline):
    """Claim 36 (MDPO, https://arxiv.org/abs/2005.09814). Each step multiplies the policy by exp(t A), A any advantage; from
    ref, with steps that add up to 1/beta, it lands exactly on pi*, in however many steps: early stopping is a KL penalty."""
    ref, reward = drawn
    logps = ref
    for share in steps:
        logps = tabular.mirror_step(logps, reward - baseline, share / sum(steps) / beta)
    assert_same(logps.exp(), world.optimal_policy(ref, reward, beta).exp(), 1e-9 * max(1, 1 / beta), what="the policy after the last step")


@given(worlds(policies=1), st.floats(-1, 1).map(lambda e: 10 ** e), st.floats(-2, 1).map(lambda e: 10 ** e))
def test_a_mirror_step_maximises_what_it_says(drawn, beta, t):
    """The step is the maximiser of E[A] - beta KL(pi || ref) - KL(pi || current)/t: at it the gradient of that is zero
    (1e-9), and random policies do worse."""
    ref, reward, pi = drawn
    value = lambda logps: tabular.objective(logps, ref, reward, beta) - world.kl(logps, pi) / t
    after = tabular.mirror_step(pi, reward, t, ref, beta)
    assert exact_gradient(value, after).abs().max() < 1e-9 * max(1, 1 / t, beta)
    assert value(pi) <= value(after) + 1e-9 * max(1, 1 / t, beta) and value(ref) <= value(after) + 1e-9 * max(1, 1 / t, beta)


@given(worlds(policies=1), betas, st.floats(-3, 2).map(lambda e: 10 ** e))
def test_mirror_descent_with_a_kl_contracts(drawn, beta, t):
    """Claim 37. With -beta KL(pi || ref) in the step, the centred log-ratio to pi* shrinks by exactly 1/(1 + beta t) a step,
    from any policy."""
    ref, reward, pi = drawn
    star = world.optimal_policy(ref, reward, beta)
    centred = lambda logps: (logps - star) - (logps - star).mean()
    assert_same(centred(tabular.mirror_step(pi, reward, t, ref, beta)), centred(pi) / (1 + beta * t), 1e-9 * max(1, 1 / beta), {
        "no contraction: the pull to the reference is missing": centred(pi)}, what="the distance to pi*")


@given(worlds(policies=1), st.floats(-2, 1).map(lambda e: 10 ** e))
def test_the_first_mirror_step_is_the_policy_gradient(drawn, t):
    """Claim 38. At pi = pi_k the KL between them has no gradient, so the first gradient step on MDPO's objective
    E_{pi_k}[pi/pi_k A] - KL(pi || pi_k)/t is the policy gradient, whatever t."""
    ref, reward, pi = drawn
    surrogate = lambda logps: (logps - pi).exp().mul(pi.exp() * reward).sum() - world.kl(logps, pi) / t
    assert_same(exact_gradient(surrogate, pi), (pi.exp() * reward) @ score(pi), 1e-10 * max(1, 1 / t), what="the first step")
    assert exact_gradient(lambda logps: world.kl(logps, pi), pi).abs().max() < 1e-12
    moved = torch.log_softmax(pi + torch.linspace(0, 1, len(pi), dtype=torch.float64), -1)
    assume((moved - pi).abs().max() > 1e-3)
    assert exact_gradient(lambda logps: world.kl(logps, pi), moved).abs().max() > 0, "a step later the KL pulls back"
