"""AIHF: labels and demonstrations together, or one after the other.

https://arxiv.org/abs/2406.06874. One reward explains both kinds of data, and the policy is the one
that is best for this reward, Eq. 4 of dpo.py's paper. So its likelihood of the demonstrations and
the Bradley-Terry likelihood of the labels are maximised together. Where the reward is the implicit
one, beta log(pi/ref), these are -log pi(y) of a demonstration and Eq. 7 of a pair. Its text could
not be read in full: the formula is rebuilt from its abstract and from reviews of it. Their weights
are not known. Here each pair and each demonstration counts once, as in maximum likelihood.

An expert writes the demonstrations: it is pi*, so that both kinds of data agree on one reward.
"""
import math

import torch
from torch.nn.utils import clip_grad_norm_

import data
import evaluate
import train
import world
from dpo import dpo_loss
from lab.systems_training import fit
from losses import stray_mass
from model import response_logits, row_logps, sequence_logps
from support.run import Run

PASSES = 4  # over all data, since there is little of it
LEAST = 100  # steps of a stage: few data are passed over more often


def draw_demonstrations(run, expert, n):
    """n texts for the train prompts in turn, a list of (prompt ids, response ids).

    expert: "optimum" draws from pi* at the run's beta, "corpus" from the grammar, as train.py's
    corpus for SFT."""
    prompts, responses = run.train_prompts, world.responses()
    logps = world.grammar_logps(prompts)  # (P, N)
    if expert == "optimum":
        ref = world.normalise(evaluate.exact_logps(run.reference, prompts))  # (P, N)
        logps = world.optimal_policy(ref, world.rewards(prompts, responses), run.beta)
    prompt = torch.arange(n) % len(prompts)  # (n,)
    # a seed of its own: with the run's, the draws would be those of the pairs
    which = data.draw(logps, prompt, torch.Generator().manual_seed(run.seed + 2_000_000))
    eos = run.tokenizer.eot_token
    return [(run.prompt_ids[x], run.tokenizer.encode_ordinary(responses[y]) + [eos])
            for x, y in zip(prompt.tolist(), which.tolist())]


def joint_loss(pair_losses, demonstration_logps, weight=1.0):
    """(sum of the pairs' losses - weight * sum of log pi(demonstration)) / the number of both.

    pair_losses (b,), demonstration_logps (d,), of one batch of data in any order. A scalar.
    """
    count = len(pair_losses) + len(demonstration_logps)
    return (pair_losses.sum() - weight * demonstration_logps.sum()) / count


def epochs_for(n, batch_size):
    return max(PASSES, math.ceil(LEAST * batch_size / n))


def fit_joint(run, folder, pairs, texts):
    """Batches are drawn from pairs and demonstrations alike. The stray mass, at weight 1, is that
    of the pairs. pairs: a Known. A policy."""
    examples, ref_chosen, ref_rejected, likely, _ = pairs
    n = len(examples)
    policy = run.new_policy().eval()
    optimizer, record = train.adamw(policy, run.flags["lr"]), Run(folder)
    record.state.unlink(missing_ok=True)
    size = run.flags["batch_size"]
    plan = data.epochs([1] * (n + len(texts)), size, run.seed, PASSES)
    for _, [(_, indices)] in record.steps("joint", policy, optimizer, plan):
        own = [i for i in indices if i < n]
        shown = [texts[i - n] for i in indices if i >= n]
        losses, logps, stray = torch.zeros(0), torch.zeros(0), 0.0
        if own:
            batch = data.collate([examples[i] for i in own])
            logits, targets, row = response_logits(policy, **batch)  # (N, V), (N,), (N,)
            chosen, rejected = row_logps(logits, targets, row, 2 * len(own)).chunk(2)  # (b,)
            losses = dpo_loss(chosen, rejected, ref_chosen[own], ref_rejected[own],
                              run.beta)[0]  # (b,)
            stray = stray_mass(logits, likely.mask(own)).sum() / (2 * len(own))
        if shown:
            logps = sequence_logps(policy, *data.pad(*map(list, zip(*shown))))  # (d,)
        loss = joint_loss(losses, logps)
        (loss + stray * len(own) / len(indices)).backward()
        record.log(loss=loss, grad_norm=clip_grad_norm_(policy.parameters(), train.CLIP))
        optimizer.step()
        optimizer.zero_grad()
    return policy


def fit_demonstrations(run, folder, texts):
    """Maximum likelihood of the demonstrations, from the run's reference. A policy."""
    policy, size = run.new_policy(), run.flags["batch_size"]
    record = Run(folder / "demonstrations")
    record.state.unlink(missing_ok=True)
    train.train_sft(policy, texts, record, epochs=epochs_for(len(texts), size),
                    batch_size=size, lr=run.flags["lr"], seed=run.seed)
    return policy.eval()


def policies(run, folder, how, pairs, texts):
    """{name: a policy}. pairs: a Known.

    how = "joint", "labels" alone, or "in turn": first the demonstrations, then DPO. Its reference
    is then the policy after the demonstrations, as in RLHF, or still the run's reference."""
    if how == "joint":
        return {"together": fit_joint(run, folder, pairs, texts)}
    epochs = epochs_for(len(pairs.examples), run.flags["batch_size"])
    if how == "labels":
        return {"labels alone": fit(run, folder, pairs, epochs=epochs)[0]}
    first = fit_demonstrations(run, folder, texts)
    moved = train.reference_logps(first, pairs.examples, 512)
    return {"demonstrations alone": first,
            "in turn, new reference": fit(run, folder, pairs, epochs=epochs, start=first,
                                          ref_logps=moved)[0],
            "in turn, old reference": fit(run, folder, pairs, epochs=epochs, start=first)[0]}
