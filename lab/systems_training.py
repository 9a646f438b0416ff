"""What lab.systems trains with: pairs, edited pairs, true values, and the loop."""
import copy
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import data
import evaluate
import train
import world
from dpo import dpo_loss
from lab.league_training import changed
from lab.more_losses import bmc_weights
from losses import LIKELY, stray_mass
from model import response_logits
from support.likely import LikelyTokens
from support.run import Run

# ---- Data

@lru_cache(maxsize=3)
def pairs_of(run):
    """The run's own pairs, texts."""
    return data.make_preferences(run.flags["pairs"], "human", run.seed)


def bridge(pair, editor, generator):
    """BMC's bridging: the loser with one word of the winner takes the winner's place. A Pair.

    editor: "chance" takes any of the words that differ; "judge" takes the one that makes the true
    reward largest. The paper lets a large language model edit, which may know what is good.
    """
    winner, loser = world.parse(pair.chosen), world.parse(pair.rejected)
    edits = []
    for place in range(6):
        if winner[place] != loser[place]:
            m1, a1, c, m2, a2, v = *loser[:place], winner[place], *loser[place + 1:]
            edits.append(f"{m1}{a1}{c}{m2}{a2}. I {v} it.")
    if editor == "judge":
        best = max(edits, key=lambda text: world.true_reward(pair.prompt, text))
    else:
        best = edits[torch.randint(len(edits), (), generator=generator)]
    return data.Pair(pair.prompt, best, pair.rejected)


class Known(NamedTuple):
    """Pairs in tokens, and what the run's reference thinks of them."""
    examples: list
    ref_chosen: torch.Tensor  # (n,)
    ref_rejected: torch.Tensor  # (n,)
    likely: LikelyTokens
    better: float  # the share of pairs whose chosen response has the larger true reward

    def first(self, n):
        return self._replace(examples=self.examples[:n])


@lru_cache(maxsize=6)  # a process does pieces of three runs in turn
def known(run, editor=None):
    """The run's own pairs, or all of them bridged by an editor."""
    pairs, generator = pairs_of(run), torch.Generator().manual_seed(run.seed)
    if editor:
        pairs = [bridge(pair, editor, generator) for pair in pairs]
    score = lru_cache(maxsize=None)(world.true_reward)
    better = [score(p.prompt, p.chosen) > score(p.prompt, p.rejected) for p in pairs]
    examples, likely = data.tokenize(pairs, run.tokenizer)[0], LikelyTokens(LIKELY)
    logps = train.reference_logps(run.reference, examples, 512, likely)  # (n,), (n,)
    return Known(examples, *logps, likely, sum(better) / len(better))


@lru_cache(maxsize=3)
def true_values(run):
    """Of every pair: chosen_true, rejected_true and log_z at the run's beta, (n,) each."""
    prompts = run.train_prompts
    r = world.rewards(prompts, world.responses())  # (P, N)
    log_z = world.log_partition(evaluate.exact_logps(run.reference, prompts), r, run.beta)  # (P,)
    score = lru_cache(maxsize=None)(world.true_reward)
    of_prompt = dict(zip(prompts, log_z.tolist()))
    rows = [(score(p.prompt, p.chosen), score(p.prompt, p.rejected), of_prompt[p.prompt])
            for p in pairs_of(run)]
    return torch.tensor(rows).unbind(1)


# ---- Training

def marks_of(examples):
    """Which response tokens of a batch an edit into the other response touches, (N,), in the order
    of model.response_logits."""
    sides = [(tuple(e.chosen), tuple(e.rejected)) for e in examples]
    sides += [(rejected, chosen) for chosen, rejected in sides]
    return torch.tensor([mark for side in sides for mark in changed(*side)])


def weighted_sums(logits, targets, row, examples, delta):
    """log pi(y|x), chosen and rejected, (2B,), from what `response_logits` returns. With a delta,
    a token counts as BMC weighs it, see more_losses.bmc_weights. With None it counts once."""
    logps = -F.cross_entropy(logits, targets, reduction="none")  # (N,)
    if delta is not None:
        logps = bmc_weights(logps, marks_of(examples), delta) * logps  # (N,)
    return logps.new_zeros(2 * len(examples)).index_add(0, row, logps)


@torch.no_grad()
def weighted_reference(reference, examples, delta):
    """BMC's weighted sums of the reference, with weights of its own. (n,), (n,)"""
    parts = [examples[i:i + 512] for i in range(0, len(examples), 512)]
    sums = [weighted_sums(*response_logits(reference, **data.collate(part)), part, delta)
            for part in parts]
    return torch.cat([s.view(2, -1) for s in sums], 1).unbind(0)


def fit(run, folder, pairs, *, loss=dpo_loss, beta=1.0, stray_weight=1.0, ref_logps=None,
        start=None, delta=None, further=None, epochs=None, probes=None):
    """Minimise a loss of the four log-probabilities and the stray mass, as train.train_dpo does.

    pairs: a Known. ref_logps: in the place of the run's reference's, two tensors (n,). start: the
    model that the policy begins as, by default the run's reference. delta: of BMC's token weights.
    further: what the loss takes besides, {name: (n,)}. probes: {share of the steps: function}.
    Returns the policy, and {share: what the function returned}.
    """
    examples, ref_chosen, ref_rejected, likely, _ = pairs
    if delta is not None:
        ref_logps = weighted_reference(run.reference, examples, delta)  # (n,), (n,)
    if ref_logps is not None:
        ref_chosen, ref_rejected = ref_logps  # (n,), (n,)
    policy = copy.deepcopy(start or run.reference).requires_grad_(True).eval()
    optimizer, record, found = train.adamw(policy, run.flags["lr"]), Run(folder), {}
    record.state.unlink(missing_ok=True)  # a training takes half a minute: it begins anew
    plan = data.epochs([1] * len(examples), run.flags["batch_size"], run.seed,
                       epochs or run.flags["epochs"])
    at = {round(share * len(plan)): share for share in probes or {}}
    for step, [(_, indices)] in record.steps("systems", policy, optimizer, plan):
        if step in at:
            found[at[step]] = probes[at[step]](policy)
        some = [examples[i] for i in indices]
        logits, targets, row = response_logits(policy, **data.collate(some))  # (N, V), (N,), (N,)
        chosen, rejected = weighted_sums(logits, targets, row, some, delta).chunk(2)  # (B,), (B,)
        losses = loss(chosen, rejected, ref_chosen[indices], ref_rejected[indices], beta,
                      **{name: values[indices] for name, values in (further or {}).items()})
        total = (losses[0] if isinstance(losses, tuple) else losses).mean()
        stray = stray_mass(logits, likely.mask(indices)).sum() / (2 * len(some))
        (total + stray_weight * stray).backward()
        record.log(loss=total, grad_norm=clip_grad_norm_(policy.parameters(), train.CLIP))
        optimizer.step()
        optimizer.zero_grad()
    return policy, found


def likelihood_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """-log pi(y_w): Preferred-FT. It has neither a reference nor a loser. (B,)"""
    return -chosen
