"""What the reference finds likely, kept for a whole training."""
import math

import torch

from support import processes


class LikelyTokens:
    """The tokens that a model finds likely, at each response token of some pairs: those to which it
    gives the probability `least` or more. There are 1/least of them at most, so their numbers are
    kept, and not a mask over a vocabulary that may have 50,000."""

    def __init__(self, least):
        self.least = least
        self.kept = {}  # {pair: (chosen, rejected)}, each (tokens, numbers of true entries)

    def keep(self, indices, logits, row):
        """Keep them for a batch: the pairs with the numbers `indices`, B of them, and what
        model.response_logits has returned: logits (N,V), row (N,), the B chosen rows first."""
        likely = logits.log_softmax(-1) >= math.log(self.least)  # (N, V)
        self.vocab, sizes = logits.size(-1), row.bincount(minlength=2 * len(indices)).tolist()
        responses = [(len(part), part.flatten().nonzero()[:, 0])
                     for part in likely.cpu().split(sizes)]
        self.kept.update(zip(indices, zip(responses, responses[len(indices):])))

    def share(self):
        """Every process gets what the others have kept."""
        for kept in processes.everyones(self.kept):
            self.kept.update(kept)

    def mask(self, indices):
        """True where a token is likely, (N,V): for a batch of these pairs, as for `keep`."""
        start, true = 0, []
        for size, numbers in [self.kept[i][side] for side in (0, 1) for i in indices]:
            true.append(numbers + start)
            start += size * self.vocab
        mask = torch.zeros(start, dtype=torch.bool)
        mask[torch.cat(true)] = True
        return mask.view(-1, self.vocab)
