"""Means with their errors, and nothing else."""
import math

import torch


def mean_and_se(values):
    """Mean and standard error of numbers, two floats. The error of a single value is unknown: nan.

    values: a list of numbers or a 1-D tensor.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return values.mean().item(), math.nan
    return values.mean().item(), values.std().item() / math.sqrt(len(values))
