"""What the proofs share: a comparison that names the mistake, and worlds for the claims that say "for every"."""
import pytest
import torch
from hypothesis import strategies as st

grades = pytest.mark.grades          # @grades("dpo_loss"): this proof is also put to a student's dpo_loss, see exercises/


class Mistake(AssertionError):
    """The result is that of a known mistake."""


class Bare(torch.nn.Module):
    """A GPT behind a plain forward: any module that maps tokens to logits, without hidden() and head."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens):
        return self.gpt(tokens)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def softplus(x):
    """log(1 + e^x) = -log sigma(-x), stable at any x: the oracle for the losses."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def assert_same(got, want, tolerance, mistakes=None, what="the result"):
    """Assert that got is want, shape included, to tolerance x max(1, largest |want|).

    mistakes: {what was probably done: what it would give}. Where got is one of these, the message says so.
    """
    __tracebackhide__ = True
    assert got is not None, f"{what} is None: is a return missing?"
    tensor = lambda x: x if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)
    got, want, mistakes = tensor(got), tensor(want), {k: tensor(v) for k, v in (mistakes or {}).items()}
    close = lambda other: (got.shape == other.shape
                           and torch.allclose(got.double(), other.double(), rtol=0, atol=tolerance * max(1.0, _size(other)),
                                              equal_nan=True))            # nan is what some mistakes give; want never is
    if close(want):
        return
    for mistake, value in mistakes.items():
        if close(value) and not torch.equal(value, want):
            raise Mistake(f"{what}: {mistake}")
    if got.shape != want.shape:
        raise AssertionError(f"{what} has shape {tuple(got.shape)}; wanted {tuple(want.shape)}")
    if not torch.isfinite(got).all():
        raise AssertionError(f"{what} is not finite: {_show(got)}; wanted {_show(want)}")
    if not got.any():
        raise AssertionError(f"{what} is zero everywhere; wanted {_show(want)}")
    if torch.allclose(got.double(), -want.double(), rtol=1e-6):
        raise AssertionError(f"{what} has the opposite sign; wanted {_show(want)}, got {_show(got)}")
    raise AssertionError(f"{what} is {_show(got)}; wanted {_show(want)}: off by {(got.double() - want.double()).abs().max():.2g}, "
                         f"allowed {tolerance:g}")


def _size(x):
    return x.abs().max().item() if x.numel() else 0.0


def _show(x):
    values = [f"{v:.6g}" for v in x.flatten()[:6].tolist()]
    return (values[0] if x.dim() == 0 else "[" + ", ".join(values) + (", ..." if x.numel() > 6 else "") + "]")


# ---- For every reward, every policy, every beta

betas = st.floats(-3, 3).map(lambda exponent: 10.0 ** exponent)          # 1e-3 to 1e3, as many small as large
numbers = lambda size, bound: st.lists(st.floats(-bound, bound, width=32), min_size=size, max_size=size).map(lambda v: vector(*v))


@st.composite
def worlds(draw, policies=0, n=None):
    """(ref_logps, reward, *policies), each (n,): log-probabilities down to about e^-20, rewards up to 10, ties included."""
    n = n or draw(st.integers(2, 6))
    distribution = numbers(n, 10).map(lambda logits: torch.log_softmax(logits, -1))
    return (draw(distribution), draw(numbers(n, 10)), *(draw(distribution) for _ in range(policies)))


@st.composite
def masked_texts(draw):
    """(logits, tokens, mask): B texts of T tokens over V, any mask at all, empty rows included."""
    b, t, v = draw(st.integers(1, 4)), draw(st.integers(2, 7)), draw(st.integers(2, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t))).view(b, t)
    return (draw(st.floats(0.01, 30)) * torch.randn(b, t, v, generator=g, dtype=torch.float64),
            torch.randint(v, (b, t), generator=g), mask)
