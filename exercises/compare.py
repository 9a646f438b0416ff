"""The comparison of the tests and the exercises: where it fails, it names the probable mistake."""
import torch

# A list that takes a note of each comparison, as (what, the largest difference, the tolerance).
# python -m pytest --claim puts one here. None: nothing is noted.
notes = None


class Mistake(AssertionError):
    """The result is that of a known mistake."""


def assert_same(got, want, tolerance, mistakes=None, what="the result"):
    """Assert that got equals want, shape included, to tolerance x max(1, largest |want|).

    mistakes: {what was probably done: the value that it gives, or a list of such values}. If got
    equals one of them, the message says what was probably done.
    """
    __tracebackhide__ = True
    assert got is not None, f"{what} is None: is a return missing?"
    got, want = _tensor(got), _tensor(want)
    if notes is not None and got.shape == want.shape:
        notes.append((what, _difference(got, want), tolerance))
    if _close(got, want, tolerance):
        return
    for mistake, values in (mistakes or {}).items():
        for value in map(_tensor, values if isinstance(values, list) else [values]):
            if _close(got, value, tolerance) and not _close(value, want, tolerance):
                raise Mistake(f"{what}: {mistake}")
    if got.shape != want.shape:
        raise Mistake(f"{what}: the shape is {tuple(got.shape)}; wanted {tuple(want.shape)}")
    if not torch.isfinite(got).all():
        raise AssertionError(f"{what}: not finite, {_show(got)}; wanted {_show(want)}")
    if not got.any():
        raise AssertionError(f"{what}: zero everywhere; wanted {_show(want)}")
    if torch.allclose(got.double(), -want.double(), rtol=1e-6, atol=0):
        raise AssertionError(f"{what}: the sign is flipped; "
                             f"got {_show(got)}, wanted {_show(want)}")
    raise AssertionError(f"{what}: got {_show(got)}; wanted {_show(want)}; "
                         f"off by {_difference(got, want):.2g}, allowed {tolerance:g}")


def _tensor(x):
    return x if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)


def _close(got, other, tolerance):
    """Whether the shapes are equal and no entry differs by more than the tolerance.

    nan counts as equal to nan: some mistakes give it. No correct result holds it.
    """
    if got.shape != other.shape:
        return False
    return torch.allclose(got.double(), other.double(), rtol=0,
                          atol=tolerance * _size(other), equal_nan=True)


def _difference(got, want):
    """The largest difference, in units of max(1, largest |want|), as the tolerance is."""
    if not want.numel():
        return 0.0
    return (got.double() - want.double()).abs().max().item() / _size(want)


def _size(x):
    return max(1.0, x.abs().max().item()) if x.numel() else 1.0


def _show(x):
    values = [f"{v:.6g}" for v in x.flatten()[:6].tolist()]
    if x.dim() == 0:
        return values[0]
    return "[" + ", ".join(values) + (", ..." if x.numel() > 6 else "") + "]"
