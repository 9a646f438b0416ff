"""dpo.py: log-probabilities, the loss, its gradient, and the numbers others computed elsewhere."""
import math
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from dpo import (analytic_gradient, central_differences, dpo_loss, gradient_check, gradient_weight, missing_mass, pair_logps,
                 preference_logits, response_logps, sequence_logps, token_logps)
from model import GPT, GPTConfig

T = lambda *values: torch.tensor(values, dtype=torch.float64)
LN2 = math.log(2)


def loss_at(h, beta, **kwargs):
    """The loss of one pair whose preference logit is h, put there by the policy's chosen log-prob."""
    return dpo_loss(T(h), T(0.0), T(0.0), T(0.0), beta=beta, **kwargs)[0].item()


# ---- Numbers computed elsewhere (claims: "Oracles with numbers"); tolerance half a unit of their last printed digit

def test_oracle_three_pairs():
    args = (T(-.5, -10, -1), T(-.1, -30, -21), T(-.5, -10.1, -.1), T(-.1, -20.1, -.1))
    assert torch.allclose(0.1 * preference_logits(*args), T(0, 1, 2), atol=1e-12)
    losses, chosen, rejected = dpo_loss(*args, beta=0.1)
    assert torch.allclose(losses, T(.693147, .313262, .126928), atol=5e-7), "Eq. 7: -log sigma(beta h); is beta inside sigma?"
    assert torch.allclose(chosen, T(0, .01, -.09), atol=1e-12), "rewards are beta (log pi - log ref): is beta included, once?"
    assert torch.allclose(rejected, T(0, -.99, -2.09), atol=1e-12)
    assert torch.allclose(dpo_loss(*args, beta=0.1, loss_type="hinge")[0], T(1, 0, 0), atol=1e-12)


@pytest.mark.parametrize("loss_type, loss, slope", [("sigmoid", .437488, -.035434), ("hinge", .4, -.1), ("ipo", 1.0, 2.0)])
def test_oracle_one_pair_loss_and_slope(loss_type, loss, slope):
    h = torch.tensor([6.0], dtype=torch.float64, requires_grad=True)
    losses, _, _ = dpo_loss(h, T(0.0), T(0.0), T(0.0), beta=0.1, loss_type=loss_type)
    assert losses.item() == pytest.approx(loss, abs=5e-7)
    assert torch.autograd.grad(losses.sum(), h)[0].item() == pytest.approx(slope, abs=5e-7)


def test_oracle_mean_of_two():
    losses, _, _ = dpo_loss(T(0, -1), T(-1, 0), T(-2, -1), T(-1, -2), beta=0.1)
    assert losses.mean().item() == pytest.approx(.698139, abs=5e-7)


def test_oracle_label_smoothing():
    assert loss_at(1.0, 1.0, label_smoothing=0.1) == pytest.approx(.413262, abs=5e-7)
    assert loss_at(1.0, 1.0, label_smoothing=0.1, loss_type="robust") == pytest.approx(.188262, abs=5e-7)


def test_oracle_gather():
    """Two positions, logits worked by hand. tokens[0] only leads in; the last logits predict nothing."""
    logits = torch.tensor([[[2, 1, .1], [.5, 2.5, .3], [9, 9, 9]]])
    logps = token_logps(logits, torch.tensor([[1, 0, 2]]))
    assert logps.shape == (1, 2)
    assert -logps.mean().item() == pytest.approx(1.4185, abs=5e-5), "is the gather shifted by exactly one position?"


# ---- Log-probabilities

def test_uniform_logits_give_minus_n_ln_v():
    """A sum of n terms -ln V: a mean would give -ln V whatever n (the objective of another paper)."""
    mask = torch.tensor([[False, False, True, True, True], [False, True, False, False, False]])
    logps = response_logps(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long), mask)
    assert torch.allclose(logps, torch.tensor([-3 * math.log(7), -math.log(7)]), atol=1e-6), "Eq. 7 sums over tokens"


def test_response_logps_is_the_log_of_the_product_of_probabilities():
    logits, tokens = torch.randn(3, 6, 5), torch.randint(5, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    for b in range(3):
        product = 1.0
        for t in range(6):
            if mask[b, t]:                          # token t is predicted by the logits at t-1
                exps = [math.exp(x) for x in logits[b, t - 1].tolist()]
                product *= exps[tokens[b, t]] / sum(exps)
        assert response_logps(logits, tokens, mask)[b].item() == pytest.approx(math.log(product), abs=1e-5)
        assert response_logps(logits, tokens, mask, average=True)[b].item() == pytest.approx(
            math.log(product) / mask[b].sum().item(), abs=1e-5)


def test_prompt_and_padding_do_not_count():
    """Asserted on log-probabilities: in the loss, a prompt counted on both sides would cancel and hide."""
    logits, tokens = torch.randn(2, 8, 5), torch.randint(5, (2, 8))
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 3:6] = True
    before = response_logps(logits, tokens, mask)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 5       # another padding id
    changed[:, :3] = (changed[:, :3] + 1) % 5       # another prompt, with the logits held fixed
    assert torch.equal(response_logps(logits, changed, mask), before), "prompt or padding is scored: look at the mask"
    noisy = logits.clone()
    noisy[:, [0, 1, 5, 6, 7]] += 3                  # positions that predict tokens outside the response
    assert torch.equal(response_logps(noisy, tokens, mask), before)
    noisy[:, 2, 0] += 1                             # position 2 predicts the first response token
    assert (response_logps(noisy, tokens, mask) != before).all(), "the first response token is predicted one position earlier"


def test_last_response_token_counts():
    """EOS is the last response token: leave it out and the model never learns to stop."""
    logits, tokens, mask = torch.randn(1, 4, 5), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, False, True, True]])
    full = response_logps(logits, tokens, mask)
    without = response_logps(logits, tokens, torch.tensor([[False, False, True, False]]))
    assert (full - without).item() == pytest.approx(torch.log_softmax(logits[0, 2], -1)[4].item(), abs=1e-6)


def test_a_row_without_response_is_finite_even_beside_infinite_logits():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = -math.inf                     # log 0 at a masked position: -inf * 0 would be nan
    value = response_logps(logits, torch.tensor([[0, 2, 1]]), torch.zeros(1, 3, dtype=torch.bool))
    assert value.item() == 0.0, "select with the mask, do not multiply by it"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    logits, tokens = (5 * torch.randn(2, 9, 50)).to(dtype), torch.randint(50, (2, 9))
    logps = token_logps(logits, tokens)
    assert logps.dtype == torch.float32
    exact = token_logps(logits.double(), tokens)
    assert (logps - exact).abs().max() < 1e-5, "log_softmax was taken in half precision"


def test_misshapen_input_is_refused():
    with pytest.raises(ValueError, match="logits"):
        token_logps(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="response_mask"):
        response_logps(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 2).bool())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_head_on_response_positions_alone_gives_the_same(dtype, tolerance):
    """Ragged masks, one of them empty: the shortcut against the plain function, values and gradients."""
    model = GPT(GPTConfig(block_size=9, vocab_size=13, n_layer=1, n_head=2, n_embd=8)).to(dtype)
    tokens, position = torch.randint(13, (4, 9)), torch.arange(9)
    mask = (position >= torch.tensor([1, 3, 5, 4])[:, None]) & (position < torch.tensor([9, 6, 5, 8])[:, None])
    short, plain = sequence_logps(model, tokens, mask), response_logps(model(tokens), tokens, mask)
    assert short.shape == (4,) and (short - plain).abs().max() < tolerance and short[2] == 0
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=dtype)
    for a, b in zip(torch.autograd.grad((short * weights).sum(), list(model.parameters())),
                    torch.autograd.grad((plain * weights).sum(), list(model.parameters()))):
        assert (a - b).abs().max() < tolerance * 10


# ---- The loss

def test_at_the_reference_the_loss_is_ln2_and_the_gradient_is_not_zero():
    """Claim 8. pi = ref: loss ln 2 exactly, rewards 0, weight 1/2, gradient -(beta/2)(grad log pi_w - grad log pi_l)."""
    w, l = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64, requires_grad=True)
    losses, chosen, rejected = dpo_loss(w, l, w.detach(), l.detach(), beta=0.3)
    assert torch.allclose(losses, torch.full_like(losses, LN2), atol=1e-15)
    assert not chosen.any() and not rejected.any()
    assert torch.equal(gradient_weight(chosen, rejected), torch.full_like(losses, 0.5))
    grad_w, grad_l = torch.autograd.grad(losses.sum(), (w, l))
    assert torch.allclose(grad_w, torch.full_like(w, -0.15), atol=1e-15)
    assert torch.allclose(grad_l, torch.full_like(l, 0.15), atol=1e-15)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "ipo", "hinge"])
def test_losses_against_their_formulas_in_plain_floats(loss_type):
    """An oracle without torch: the formulas of the four papers, math.exp and all. Tolerance 1e-12."""
    eps = 0.2 if loss_type in ("sigmoid", "robust") else 0.0
    for beta in (0.05, 0.5, 2.0):
        for h in (-7.0, -0.4, 0.0, 0.3, 5.0):
            nll = lambda x: math.log1p(math.exp(-x))
            expected = {"sigmoid": (1 - eps) * nll(beta * h) + eps * nll(-beta * h),
                        "robust": ((1 - eps) * nll(beta * h) - eps * nll(-beta * h)) / (1 - 2 * eps),
                        "ipo": (h - 1 / (2 * beta)) ** 2,
                        "hinge": max(0.0, 1 - beta * h)}[loss_type]
            assert loss_at(h, beta, loss_type=loss_type, label_smoothing=eps) == pytest.approx(expected, abs=1e-12)


def test_loss_is_minus_log_sigma_of_the_reward_margin():
    """Rewards without beta, or with beta twice, break this for every beta but 1."""
    four = [torch.randn(50, dtype=torch.float64) * 5 for _ in range(4)]
    for beta in (0.03, 0.4, 3.0):
        losses, chosen, rejected = dpo_loss(*four, beta=beta)
        assert torch.allclose(losses, torch.log1p(torch.exp(-(chosen - rejected))), atol=1e-10)


def test_the_reference_matters_through_its_log_ratio_only():
    """Claim 10. c(x) added to both reference log-probs changes nothing; added to one it does (else it is not DPO but CPO)."""
    w, l, rw, rl = (torch.randn(9, dtype=torch.float64) for _ in range(4))
    base = dpo_loss(w, l, rw, rl)[0]
    c = torch.randn(9, dtype=torch.float64)
    assert torch.allclose(dpo_loss(w, l, rw + c, rl + c)[0], base, atol=1e-12)
    assert (dpo_loss(w, l, rw + 1, rl)[0] - base).abs().min() > 1e-3, "the reference is ignored"


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_finite_at_extreme_margins(margin):
    h = torch.tensor([margin], requires_grad=True)
    losses = dpo_loss(h, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=1.0)[0]
    assert losses.item() == pytest.approx(max(0.0, -margin), abs=1e-3), "log(sigmoid(x)) underflows; logsigmoid does not"
    assert torch.autograd.grad(losses.sum(), h)[0].isfinite().all()


@pytest.mark.parametrize("bad, message", [
    (dict(beta=0.0), "beta=0.0"), (dict(beta=float("nan")), "beta=nan"), (dict(label_smoothing=0.5), "label_smoothing=0.5"),
    (dict(label_smoothing=0.1, loss_type="ipo"), "not defined"), (dict(loss_type="dpo"), "'dpo'")])
def test_settings_that_mean_nothing_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(T(0.0), T(0.0), T(0.0), T(0.0), **bad)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 1))


# ---- The gradient

@pytest.fixture
def tiny():
    """A tiny GPT in float64 and a batch of 3 pairs whose rewards disagree, so that no two weights are alike."""
    torch.manual_seed(3)
    policy = GPT(GPTConfig(block_size=7, vocab_size=9, n_layer=1, n_head=2, n_embd=8)).double()
    tokens, position = torch.randint(9, (6, 7)), torch.arange(7)
    tokens[3:, :2] = tokens[:3, :2]
    mask = (position >= 2) & (position < 2 + torch.tensor([5, 3, 4, 2, 5, 1])[:, None])
    batch = {"tokens": tokens, "response_mask": mask, "ref_chosen_logps": torch.randn(3).double() * 3 - 8,
             "ref_rejected_logps": torch.randn(3).double() * 3 - 8}
    return policy, batch


def test_analytic_gradient_is_autograd_and_differences_at_every_level(tiny):
    """Claim 9. Tolerances: 1e-9 against autograd, 1e-6 against differences; largest entries must be far from zero."""
    names = []
    for name, _, autograd, differences, largest in gradient_check(*tiny, beta=0.7):
        names.append(name)
        assert autograd <= 1e-9, f"{name}: the weight is sigma(r_l - r_w), times -beta: is a sign or beta lost?"
        assert differences <= 1e-6, name
        assert largest > 1e-6, f"{name}: a gradient of zeros would pass any comparison with zeros"
    assert names[:3] == ["log pi(y_w|x)", "log pi(y_l|x)", "logits"] and len(names) == 3 + len(list(tiny[0].parameters()))


def test_analytic_gradient_against_one_pair_at_a_time(tiny):
    """An oracle that uses neither dpo_loss nor the batch: for each pair, the two gradients and the weight by hand."""
    policy, batch = tiny
    beta, params = 0.7, list(policy.parameters())
    total = [torch.zeros_like(p) for p in params]
    for i in range(3):
        logp = {}
        for side, row in (("w", i), ("l", i + 3)):
            logits = policy(batch["tokens"][row:row + 1])[0]
            logp[side] = sum(torch.log_softmax(logits[t - 1], -1)[batch["tokens"][row, t]]
                             for t in range(7) if batch["response_mask"][row, t])
        reward_w = beta * (logp["w"].item() - batch["ref_chosen_logps"][i].item())
        reward_l = beta * (logp["l"].item() - batch["ref_rejected_logps"][i].item())
        weight = 1 / (1 + math.exp(reward_w - reward_l))
        for side, sign in (("w", -1), ("l", +1)):
            for t, g in zip(total, torch.autograd.grad(logp[side], params)):
                t += sign * beta * weight * g / 3
    for ours, oracle in zip(analytic_gradient(policy, batch, beta), total):
        assert torch.allclose(ours, oracle, atol=1e-12)


def test_any_module_that_maps_tokens_to_logits_will_do(tiny):
    """Not only model.GPT, whose head can run on some positions alone: the same gradient through full logits (1e-12)."""
    class Plain(torch.nn.Module):
        def __init__(self, gpt):
            super().__init__()
            self.gpt = gpt

        def forward(self, tokens):
            return self.gpt(tokens)

    policy, batch = tiny
    for a, b in zip(analytic_gradient(Plain(policy), batch, 0.7), analytic_gradient(policy, batch, 0.7), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_gradient_check_notices_a_wrong_gradient(tiny, monkeypatch):
    """The check itself can fail: with the weight's sign flipped it must report a difference."""
    import dpo
    monkeypatch.setattr(dpo, "gradient_weight", lambda w, l: torch.sigmoid(w - l))
    assert max(row[2] for row in gradient_check(*tiny, beta=0.7)) > 1e-3


def test_central_differences_of_a_cubic():
    x = T(1.0, -2.0, 0.5)
    assert torch.allclose(central_differences(lambda: (x ** 3).sum(), x), 3 * T(1.0, 4.0, 0.25), atol=1e-8)
    assert torch.equal(x, T(1.0, -2.0, 0.5)), "the tensor must be put back as it was"


def test_pair_logps_splits_chosen_from_rejected(tiny):
    policy, batch = tiny
    chosen, rejected = pair_logps(policy, batch)
    for i, logps in enumerate((chosen, rejected)):
        rows = slice(3 * i, 3 * i + 3)
        alone = response_logps(policy(batch["tokens"][rows]), batch["tokens"][rows], batch["response_mask"][rows])
        assert torch.allclose(logps, alone, atol=1e-12)


def test_the_command_prints_the_table():
    done = subprocess.run([sys.executable, "dpo.py"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith(("  exact", "  approximate", "  WRONG"))]
    assert len(rows) == 3 + 2 + 2 * 12 + 2, "log-probs, logits, two embeddings, two blocks of 12 tensors, the last LayerNorm"
    assert not any(row.endswith("WRONG") for row in rows)


# ---- Missing mass

def test_missing_mass_is_unbiased_and_its_gradient_vanishes_where_nothing_is_missing():
    """E_{y~ref}[pi/ref] summed exactly over a tabular world of 5 responses of which ref writes 4."""
    torch.manual_seed(1)
    ref = torch.softmax(torch.randn(4, dtype=torch.float64), -1)
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    logps = torch.log_softmax(theta, -1)
    estimates = torch.stack([missing_mass(logps[y:y + 1], ref[y:y + 1].log()) for y in range(4)])
    assert (ref * estimates).sum().item() == pytest.approx(logps[4].exp().item(), abs=1e-12)
    two = missing_mass(T(0.5, 0.2).log(), T(0.25, 0.4).log())
    assert two.item() == pytest.approx(1 - (0.5 / 0.25 + 0.2 / 0.4) / 2, abs=1e-12), "the mean of pi/ref, not exp of a mean"
    shut = theta.detach().clone()
    shut[4] = -80.0                                  # nothing outside the support
    shut.requires_grad_()
    logps = torch.log_softmax(shut, -1)
    loss = (ref * torch.stack([missing_mass(logps[y:y + 1], ref[y:y + 1].log()) for y in range(4)])).sum()
    assert torch.autograd.grad(loss, shut)[0].abs().max() < 1e-12, "it must not pull at a policy that leaks nothing"


def test_eq7_does_not_see_mass_that_leaks_evenly():
    """Why the term exists: moving mass from both responses to text in no pair leaves the loss where it was."""
    w, l, rw, rl = (torch.randn(9) for _ in range(4))
    assert torch.allclose(dpo_loss(w - 3, l - 3, rw, rl)[0], dpo_loss(w, l, rw, rl)[0], atol=1e-6)
    assert missing_mass(w - 3, rw) > missing_mass(w, rw)
