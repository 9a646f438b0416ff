"""What the proofs share: a comparison that names the mistake, and worlds for claims of the form
"for every reward, every policy, every beta"."""
import pytest
import torch
from hypothesis import strategies as st

from exercises.compare import Mistake, assert_same  # noqa: F401

# @grades("dpo_loss"): this proof is also put to a student's dpo_loss, see exercises/
grades = pytest.mark.grades


class Bare(torch.nn.Module):
    """A GPT behind a plain forward: it maps tokens to logits and has neither hidden() nor head."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens):
        return self.gpt(tokens)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def assert_refused(function, *args, **kwargs):
    """Assert that a function refuses these arguments with a ValueError. Returns its message."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(f"raises {type(error).__name__}; wanted a ValueError") from error
    raise AssertionError("accepted; wanted a ValueError")


def softplus(x):
    """log(1 + e^x) = -log sigma(-x), stable at any x: the oracle for the losses."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


# ---- For every reward, every policy, every beta

betas = st.floats(-3, 3).map(lambda exponent: 10.0 ** exponent)  # 1e-3 to 1e3, small ones as often


def numbers(size, bound):
    """Vectors of the given size, with entries from -bound to bound."""
    entry = st.floats(-bound, bound, width=32)
    return st.lists(entry, min_size=size, max_size=size).map(lambda v: vector(*v))


@st.composite
def worlds(draw, policies=0, n=None):
    """(ref_logps, reward, *policies), each (n,). Log-probabilities go down to about e^-20, rewards
    up to 10; ties are included."""
    n = n or draw(st.integers(2, 6))
    distribution = numbers(n, 10).map(lambda logits: torch.log_softmax(logits, -1))
    ref_logps, reward = draw(distribution), draw(numbers(n, 10))
    return (ref_logps, reward, *(draw(distribution) for _ in range(policies)))


@st.composite
def masked_texts(draw):
    """(logits, tokens, mask): B texts of T tokens over V, with any mask, empty rows too."""
    b, t, v = draw(st.integers(1, 4)), draw(st.integers(2, 7)), draw(st.integers(2, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    mask = draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t))
    scale = draw(st.floats(0.01, 30))
    logits = scale * torch.randn(b, t, v, generator=g, dtype=torch.float64)  # (B, T, V)
    tokens = torch.randint(v, (b, t), generator=g)  # (B, T)
    return logits, tokens, torch.tensor(mask).view(b, t)
