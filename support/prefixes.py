"""Why a model need not read the prompt of a pair twice.

A state of a transformer depends on the tokens up to its own, and on nothing else. So where two
rows of a batch begin alike, they have the same states: both responses to a prompt, up to the first
token that differs. All of a transformer but the attention works on each token alone. It needs each
of these states once, and no padding. Only the attention looks at whole sequences.
"""
import numpy as np
import torch


def distinct_prefixes(idx, needed):
    """What the rows of idx (B,T) begin with, each beginning once: N of them.

    needed (B,T): where a state is wanted. What stands after the last of them is left out.
    Returns the last token of each beginning (N,), its position (N,), and two tables: for each
    place (B,T) its beginning, a number below N; for each beginning one of its places (N,), a
    number below B T.
    """
    needed = needed.cpu().flip(1).cummax(1).values.flip(1)  # (B, T): and all that comes before
    needed[:, 0] = True  # so that there is something to compute
    rows = idx.cpu().masked_fill(~needed, -1)  # (B, T)
    # Once the rows are sorted, what a row shares with any before, it shares with the one before.
    order = torch.from_numpy(np.lexsort(rows.t().flip(0).numpy()))  # (B,)
    rows = rows[order]
    new = rows >= 0  # (B, T)
    new[1:] &= (rows[1:] == rows[:-1]).cumprod(1) == 0
    number = new.flatten().cumsum(0).view_as(new) - 1  # (B, T)
    sorted_state = (number * new).cummax(0).values  # (B, T)
    state = torch.empty_like(sorted_state)
    state[order] = sorted_state
    row, pos = new.nonzero(as_tuple=True)  # (N,), (N,)
    return rows[new], pos, state, order[row] * rows.size(1) + pos
