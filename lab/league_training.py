"""What lab.league trains with: the labels of a condition, what a loss asks for, and the loop."""
import copy
import difflib
import math
import time
from dataclasses import replace
from functools import lru_cache

import torch
from torch.nn.utils import clip_grad_norm_

import data
import train
import world
from lab.judges import by_text
from lab.league_methods import FEW, FLIPPED
from lab.more_losses import bco_pair_loss, bmc_logps, further_arguments, kto_kl
from losses import LIKELY, missing_mass, stray_mass
from model import response_logits, row_logps, sequence_logps
from rlhf import MAX_NEW_TOKENS, response_token_logps
from support.likely import LikelyTokens
from support.run import Run

# ---- The labels of a condition

def prefers_first(first, second, condition):
    """The probability that a condition's annotator prefers the first response, from the scores of
    both. (B,), (B,) -> (B,)"""
    p = world.preference_prob(first, second)  # (B,), Eq. 1
    if condition == "deterministic":
        p = (first > second) + 0.5 * (first == second)  # (B,)
    flipped = FLIPPED.get(condition, 0.0)
    return (1 - flipped) * p + flipped * (1 - p)  # (B,)


@lru_cache(maxsize=4)  # a process does many pieces on the same pairs, of three runs or so
def labelled(run, condition):
    """The run's own pairs in tokens, with the labels of a condition."""
    annotator = "length" if condition == "length" else "human"
    pairs = data.make_preferences(run.flags["pairs"], annotator, run.seed)
    if condition == "few":
        pairs = pairs[:FEW]
    # a seed of its own: with the run's, the flips would depend on the responses that it draws
    generator = torch.Generator().manual_seed(run.seed + 1_000_000)
    swapped = torch.rand(len(pairs), generator=generator) < FLIPPED.get(condition, 0.0)  # (n,)
    if condition == "deterministic":
        swapped = [world.true_reward(p.prompt, p.rejected) > world.true_reward(p.prompt, p.chosen)
                   for p in pairs]
    pairs = [replace(p, chosen=p.rejected, rejected=p.chosen) if swap else p
             for p, swap in zip(pairs, swapped)]
    return data.tokenize(pairs, run.tokenizer)[0]


@lru_cache(maxsize=6)
def looked_up(run, condition, with_likely):
    """What the reference thinks of a condition's pairs, which all methods share: log ref of both
    responses, (N,), (N,); the LikelyTokens, or None unless asked for; and the seconds it took."""
    examples, likely = labelled(run, condition), LikelyTokens(LIKELY) if with_likely else None
    start = time.process_time()
    logps = train.reference_logps(run.reference, examples, 512, likely)
    return logps, likely, time.process_time() - start


def new_pairs(run, policy, first, count, condition):
    """Pairs from the policy as it is now, with fresh labels: a list of Example. The prompts come
    in turn, from number `first` on. Where both responses are equal, the gradient of DPO is 0."""
    prompts = [run.prompt_ids[(first + i) % len(run.prompt_ids)] for i in range(count)]
    responses = policy.generate(prompts * 2, MAX_NEW_TOKENS, eos_id=run.tokenizer.eot_token)
    score = by_text(world.length_score if condition == "length" else world.true_reward)
    a, b = score(prompts * 2, responses).chunk(2)  # (count,), (count,)
    first_wins = torch.rand(count) < prefers_first(a, b, condition)
    return [data.Example(x, *((y, z) if wins else (z, y)))
            for x, y, z, wins in zip(prompts, responses, responses[count:], first_wins)]


# ---- What a loss asks for besides the four log-probabilities

def vocabulary_kl(policy, reference, tokens, mask):
    """The sum over response positions of KL(ref||pi) over the vocabulary. (B,T), (B,T) -> (B,)"""
    mask = mask[:, 1:]  # (B, T-1)

    def distributions(model):
        states = model.hidden(tokens[:, :-1], needed=mask)[mask]  # (N, C)
        return torch.log_softmax(model.head(states), -1)  # (N, V)

    p = distributions(policy)  # (N, V)
    with torch.no_grad():
        ref = distributions(reference)  # (N, V)
    at_token = (ref.exp() * (ref - p)).sum(-1)  # (N,)
    return torch.zeros(len(tokens)).index_add(0, mask.nonzero()[:, 0], at_token)  # (B,)


def mismatched(examples):
    """tokens and response_mask, (2B,T) each: every prompt with the response of the row before."""
    prompts = [e.prompt for e in examples] * 2
    responses = [e.chosen for e in examples] + [e.rejected for e in examples]
    return data.pad(prompts, responses[-1:] + responses[:-1])


def brought(needs, policy, reference, examples, batch):
    """{name: value} of what a loss asks for by these names."""
    found, both = {}, (batch["tokens"], batch["response_mask"])
    if "chosen_lengths" in needs:
        found["chosen_lengths"], found["rejected_lengths"] = both[1].sum(1).float().chunk(2)
    if "chosen_kl" in needs:
        kls = vocabulary_kl(policy, reference, *both)  # (2B,)
        found["chosen_kl"], found["rejected_kl"] = kls.chunk(2)
    if "kl" in needs:
        with torch.no_grad():
            other = mismatched(examples)
            found["kl"] = kto_kl(sequence_logps(policy, *other), sequence_logps(reference, *other))
    return {name: found[name] for name in needs}


@lru_cache(maxsize=100_000)
def changed(response, other):
    """Which tokens of a response an edit into the other one touches, a list of booleans."""
    touched = [True] * len(response)
    for at, _, size in difflib.SequenceMatcher(None, response, other, False).get_matching_blocks():
        touched[at:at + size] = [False] * size
    return touched


def weighted_logps(model, examples, batch, delta):
    """BMC's log-probabilities, chosen and rejected in one. (2B,)"""
    tokens, mask = batch["tokens"], batch["response_mask"][:, 1:]  # (2B, T), (2B, T-1)
    sides = [(tuple(e.chosen), tuple(e.rejected)) for e in examples]
    sides += [(rejected, chosen) for chosen, rejected in sides]
    marks = torch.zeros_like(mask)  # (2B, T-1)
    marks[mask] = torch.tensor([mark for side in sides for mark in changed(*side)])
    return bmc_logps(response_token_logps(model, tokens, mask), mask, marks, delta)


# ---- Training

def plan_of(count, steps, batch_size, seed):
    """`steps` batches of indices into `count` pairs, one epoch after another, as train.py's."""
    epochs = math.ceil(steps / math.ceil(count / batch_size))
    return data.epochs([1] * count, batch_size, seed, epochs)[:steps]


def move(reference, policy, mix):
    """The reference's weights become mix times the policy's plus (1 - mix) times their own."""
    with torch.no_grad():
        for own, its in zip(reference.parameters(), policy.parameters()):
            own.lerp_(its, mix)


def fit(run, folder, loss, condition, *, lr, stray_weight=0.0, norm_weight=0.0, rounds=0, moves=0,
        mix=1.0, bmc=None, **options):
    """Minimise a loss, begun at the reference. Returns the policy, and what has stopped the
    training before its end, a text, or None.

    options: of the loss, beta among them. stray_weight, norm_weight: of losses.stray_mass and of
    losses.missing_mass. rounds: how often new pairs take the place of the run's own. moves, mix:
    how often the reference moves, see `move`. bmc: the delta of BMC's token weights.
    """
    policy, reference, examples = run.new_policy(), run.reference, labelled(run, condition)
    size, seed = run.flags["batch_size"], run.seed
    steps = run.flags["epochs"] * math.ceil(run.flags["pairs"] / size)
    plan = plan_of(len(examples), steps, size, seed)
    if rounds:
        count, each = len(examples) // rounds, steps // rounds
        plan = [batch for k in range(rounds) for batch in plan_of(count, each, size, seed + k)]
    moving = {round(len(plan) * k / (moves + 1)) for k in range(1, moves + 1)}
    needs = {name for name, default in further_arguments(loss).items() if default is None}
    optimizer, record = train.adamw(policy, lr), Run(folder)
    ref_logps, seen = None, []  # of all pairs, (N,), (N,); BCO's mean reward of each batch
    if not rounds:
        ref_logps, likely, _ = looked_up(run, condition, stray_weight > 0)
    # What an interrupted training has saved lacks the moved reference and the new pairs. A training
    # takes half a minute, so it begins anew.
    record.state.unlink(missing_ok=True)
    policy.eval()
    for step, [(_, indices)] in record.steps("league", policy, optimizer, plan):
        if rounds and step % each == 0:
            examples = new_pairs(run, policy, step // each * count, count, condition)
            ref_logps = None
        if step in moving:
            reference = copy.deepcopy(reference)  # the run's own stays where it is
            move(reference, policy, mix)
            ref_logps = None
        if ref_logps is None:
            likely = LikelyTokens(LIKELY) if stray_weight else None
            ref_logps = train.reference_logps(reference, examples, 512, likely)  # (N,), (N,)
        pairs = [examples[i] for i in indices]
        batch = data.collate(pairs)
        if bmc is None:
            logits, targets, row = response_logits(policy, **batch)  # (n, V), (n,), (n,)
            logps = row_logps(logits, targets, row, 2 * len(pairs))  # (2B,)
            ref = [side[indices] for side in ref_logps]  # (B,), (B,)
        else:
            logps = weighted_logps(policy, pairs, batch, bmc)  # (2B,)
            with torch.no_grad():
                ref = weighted_logps(reference, pairs, batch, bmc).chunk(2)  # (B,), (B,)
        chosen, rejected = logps.chunk(2)  # (B,), (B,)
        if loss is bco_pair_loss:  # the mean of all implicit rewards until now
            seen.append(options["beta"] * (logps.detach() - torch.cat(ref)).mean())
            options["delta"] = torch.stack(seen).mean()
        losses = loss(chosen, rejected, *ref, **options,
                      **brought(needs, policy, reference, pairs, batch))
        losses = losses[0] if isinstance(losses, tuple) else losses  # (B,)
        total = losses.mean()
        if stray_weight:
            stray = stray_mass(logits, likely.mask(indices)).sum() / len(logps)
            total = total + stray_weight * stray
        if norm_weight:
            total = total + norm_weight * missing_mass(logps, torch.cat(ref))
        total.backward()
        norm = clip_grad_norm_(policy.parameters(), train.CLIP)
        if not torch.isfinite(norm):  # a result, and no accident
            return policy, f"step {step}: the loss is {total.item():g}, its gradient {norm:g}"
        record.log(loss=total, grad_norm=norm)
        optimizer.step()
        optimizer.zero_grad()
    return policy, None
