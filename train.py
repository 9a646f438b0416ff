"""From nothing to a policy trained by DPO, measured against the best policy that is possible.

    python train.py               the toy world: everything is measured against the exact optimum
    python train.py --data FILE   your own preference pairs; see support/preferences.py

DPO is OFFLINE: the pairs are collected before, and training draws no sample. Its REFERENCE IS
FIXED: its log-probabilities of the data are computed once, and looked up afterwards. Its REWARD IS
IMPLICIT: no reward model is trained; beta log(pi/ref) is the reward.
"""
import time

START = time.time()  # before the imports: the seconds reported are the seconds waited

import copy
import math
from functools import partial

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data
import evaluate
import world
from losses import LIKELY, LOSSES, SMOOTHED, stray_mass
from model import GPT, GPTConfig, response_logits, row_logps, sequence_logps
from support import checkpoints, command, flags, own_data, processes, toy_data
from support.files import write_json
from support.likely import LikelyTokens
from support.machine import pick_device, precision_of, recompute
from support.run import Run, start

SFT_TEXTS, SFT_BATCH = 48_000, 32  # the toy corpus
MEASURE_AT = (0, .01, .03, .07, .15, .3, .6, 1)  # shares of a training, for the figures
CLIP = 10.0  # of the gradient; not the usual 1, since a response's log-probabilities are summed


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
                             fused=True)  # one operation for all parameters


# ---- Step 1. The reference policy, by supervised fine-tuning

def train_sft(model, texts, run, *, epochs, batch_size, lr, seed, accumulate=1):
    """Maximum likelihood of the responses. texts: a list of (prompt ids, response ids)."""
    optimizer = adamw(model, lr)
    lengths = [len(prompt) + len(response) for prompt, response in texts]
    plan = data.epochs(lengths, batch_size, seed, epochs)
    model.train()
    for _, parts in run.steps("sft", model, optimizer, plan, accumulate, unit="texts"):
        for share, indices in parts:
            # log pi(y|x) of each text of the batch
            prompts, responses = zip(*(texts[i] for i in indices))
            logps = sequence_logps(model, *data.pad(prompts, responses))  # (B,)
            # The loss is a mean over texts. A mean over tokens would give a short text's tokens
            # more weight than a long text's, and the reference would be terser than its corpus.
            loss = -logps.mean()
            (share * loss).backward()
            run.log(share, loss=loss)
        # the gradient, of all processes together, is clipped, and one step is taken along it
        processes.add_up_gradients(model)
        run.log(grad_norm=clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad()


# ---- Step 2. What the reference thinks of the data, once and for all

@torch.no_grad()
def reference_logps(reference, examples, batch_size, likely=None):
    """log ref(y_w|x) and log ref(y_l|x) of every example, two tensors (N,), in their order. After
    this, training needs no second model in memory. likely: a LikelyTokens, to keep there the
    tokens that the reference finds likely."""
    # like prompts together: what they begin with is computed once, and little is padding
    order = processes.mine(sorted(range(len(examples)), key=lambda i: (
        len(examples[i]), examples[i].prompt)))
    out = torch.zeros(2, len(examples), device=next(reference.parameters()).device)  # (2, N)
    for i in tqdm(range(0, len(order), batch_size), desc="     ref", unit="batch",
                  dynamic_ncols=True):
        indices = order[i:i + batch_size]
        batch = data.collate([examples[j] for j in indices])
        logits, targets, row = response_logits(reference, **batch)  # (n, V), (n,), (n,)
        logps = row_logps(logits, targets, row, 2 * len(indices))  # (2B,)
        out[:, indices] = logps.view(2, -1)  # chosen, rejected
        if likely is not None:
            likely.keep(indices, logits, row)
    if likely is not None:
        likely.share()
    processes.add_up(out)
    return out[0], out[1]


# ---- Step 3. DPO

def train_dpo(policy, examples, ref_logps, run, *, likely=None, stage="dpo", beta, loss="sigmoid",
              label_smoothing=0.0, stray_weight=0.0, nll_weight=0.0, epochs, batch_size, lr, seed,
              accumulate=1, ceiling=None, measure=None, measure_at=MEASURE_AT):
    """Minimise a preference loss over a fixed set of pairs.

    policy: a GPT, changed in place; it begins as the reference. ref_logps, likely: what
    `reference_logps` returned and kept for these examples. loss: a name in losses.LOSSES.
    stray_weight, nll_weight: weights of losses.stray_mass, which needs `likely`, and of
    -log pi(y_w|x). ceiling: the accuracy that the labels' noise allows, logged beside the
    accuracy. measure(policy): a dict, recorded at measure_at.
    """
    if stray_weight and likely is None:
        raise ValueError("stray_weight needs `likely`, which train.reference_logps fills")
    options = {"label_smoothing": label_smoothing} if loss in SMOOTHED else {}
    optimizer = adamw(policy, lr)
    plan = data.epochs([len(e) for e in examples], batch_size, seed, epochs)
    steps_to_measure = {round(len(plan) * share) for share in measure_at}
    # Dropout is off, as it was for the reference. Otherwise the two would differ at step 0.
    policy.eval()
    show = ("loss", "rewards/accuracies", "rewards/ceiling", "rewards/margins")
    for step, parts in run.steps(stage, policy, optimizer, plan, accumulate, show):
        if measure and step in steps_to_measure:
            run.record(stage=stage, step=step, **measure(policy))
        for share, indices in parts:
            # log pi of both responses is computed; log ref of both is looked up
            batch = data.collate([examples[i] for i in indices])
            logits, targets, row = response_logits(policy, **batch)  # (n, V), (n,), (n,)
            logps = row_logps(logits, targets, row, 2 * len(indices))  # (2B,)
            chosen, rejected = logps.chunk(2)  # (B,), (B,)
            ref = [side[indices] for side in ref_logps]  # (B,), (B,)
            # the loss: Eq. 7, or another one of losses.py
            losses, chosen_rewards, rejected_rewards = LOSSES[loss](
                chosen, rejected, *ref, beta, **options)  # each (B,)
            # the remedies for what Eq. 7 does not see; the default run uses the stray mass
            total = losses.mean() - nll_weight * chosen.mean()
            if likely is not None:
                mask = likely.mask(indices).to(logits.device)  # (n, V)
                stray = stray_mass(logits, mask).sum() / len(logps)  # a mean over responses
                total = total + stray_weight * stray
                run.log(share, stray_mass=stray)
            (share * total).backward()
            # what one watches: how many pairs are ranked as labelled (a tie counts 1/2), and why
            right = chosen_rewards > rejected_rewards
            accuracy = right + 0.5 * (chosen_rewards == rejected_rewards)  # (B,)
            run.log(share, **{
                "loss": losses.mean(),
                "rewards/chosen": chosen_rewards.mean(),
                "rewards/rejected": rejected_rewards.mean(),
                "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
                "rewards/accuracies": accuracy.mean(),
                "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean()})
            if ceiling is not None:
                run.log(share, **{"rewards/ceiling": ceiling})
        # the gradient, of all processes together, is clipped, and one step is taken along it
        processes.add_up_gradients(policy)
        run.log(grad_norm=clip_grad_norm_(policy.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad()
    if measure:
        run.record(stage=stage, step=len(plan), **measure(policy))


# ---- The whole run

def main(argv=None):
    args = flags.parse_args(argv, __doc__)
    toy = args.data is None
    device = processes.join(pick_device(args.device))
    run = start(args.out_dir, flags.kept(args), args.resume)
    torch.manual_seed(args.seed)
    tokenizer = data.get_tokenizer(args.tokenizer)
    if toy:
        texts, examples = toy_data.load(tokenizer, SFT_TEXTS, args.pairs, args.annotator, args.seed)
    else:
        texts, examples = own_data.load(args.data, tokenizer, args.max_length, args.seed,
                                        args.skip_bad_rows)
        run.where = examples.where

    # 1. The reference. A file that is there already was made before an interruption.
    sft_file = args.out_dir / "sft.pt"
    if sft_file.exists():
        reference = run.load_model(sft_file, device)
    else:
        longest = max(map(len, examples))
        if args.init:
            reference = own_data.load_init(args.init, tokenizer, longest)
        else:
            block_size = 64 if toy else 32 * math.ceil(longest / 32)
            reference = GPT(GPTConfig(block_size, tokenizer.n_vocab, args.n_layer,
                                      n_head=args.n_embd // 32, n_embd=args.n_embd))
        reference = reference.to(device)
        recompute(reference, args.recompute)
        size = sum(p.numel() for p in reference.parameters())
        print(f"Model: {size:,} parameters on {device}. SFT on {len(texts):,} texts, "
              f"then DPO on {len(examples):,} pairs, beta = {args.beta:g}.")
        run.begin()
        if args.sft_epochs:
            with precision_of(args.dtype, device):
                train_sft(reference, texts, run, epochs=args.sft_epochs, lr=args.sft_lr,
                          batch_size=SFT_BATCH if toy else args.batch_size,
                          seed=args.seed, accumulate=args.accumulate)
        checkpoints.save_model(reference, sft_file, flags=run.flags)
    reference.eval().requires_grad_(False)

    # 2. What the reference thinks of the data, once and for all.
    at_once = 512 if toy else math.ceil(args.batch_size / args.accumulate)
    likely = LikelyTokens(LIKELY) if args.stray_weight else None
    with precision_of(args.dtype, device):
        ref_logps = reference_logps(reference, examples, at_once, likely)

    # 3. DPO. On the toy world plain DPO (Eq. 7 alone) runs beside it, for comparison: from the same
    # reference, on the same pairs, in the same order.
    settings = flags.dpo_settings(vars(args))
    ceiling = measure = None
    if toy:
        held_out = world.prompts()[1]
        ref_exact = evaluate.exact_logps(reference, held_out)  # (P, N)
        ceiling = toy_data.ceiling(args.annotator)

        def measure(policy):
            return evaluate.measure(evaluate.exact_logps(policy, held_out), ref_exact, args.beta)

    def train_policy(run, stage, settings):
        file = args.out_dir / f"{stage}.pt"
        if file.exists():  # it was made before an interruption
            return
        # the policy's own copy of the weights: the reference must not move with it
        policy = copy.deepcopy(reference).requires_grad_(True)
        recompute(policy, args.recompute)
        with precision_of(args.dtype, device):
            train_dpo(policy, examples, ref_logps, run, likely=likely, stage=stage,
                      ceiling=ceiling, measure=measure, **settings)
        checkpoints.save_model(policy, file, flags=run.flags,
                               reference=checkpoints.fingerprint(reference))

    side = Run(args.out_dir / "plain", run.flags)
    stages = [(run, "dpo", settings)]
    if toy and (args.stray_weight or args.nll_weight):
        stages.append((side, "plain", settings | {"stray_weight": 0.0, "nll_weight": 0.0}))
    processes.side_by_side([partial(train_policy, *stage) for stage in stages], device)
    run.take_over(side)

    # 4. How good is the policy?
    if not processes.leave():
        return
    summary = evaluate.report(args.out_dir, device)
    from support import figures  # only here: it chooses matplotlib's backend
    figures.draw_run(args.out_dir, summary)
    summary["seconds"] = time.time() - START
    write_json(summary, args.out_dir / "summary.json")
    print(f"Done in {summary['seconds']:.0f} s.")


if __name__ == "__main__":
    command.run(main)
