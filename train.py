"""From nothing to a DPO-trained policy: SFT -> the reference's log-probabilities, once -> DPO -> measurement.

    python train.py                       the toy world: everything measured against the exact optimum
    python train.py --data FILE           your own preference pairs (see data.load_preferences for the formats)

Writes to --out-dir: sft.pt (the reference), dpo.pt (the policy), plain.pt (the toy run's comparison, Eq. 7 alone),
metrics.jsonl, summary.json, curves.png and, on the toy world, frontier.png.

Three assumptions of DPO stand in plain sight below. It is OFFLINE: the pairs are collected before training and nothing is
sampled while it runs. The MODELS ARE FIXED: the reference never changes, so its log-probabilities of the data are computed
once and then looked up. The REWARD MODEL IS IMPLICIT: no reward model is trained; beta log(pi/ref) is the reward.
"""
import time

START = time.time()          # before the imports, so that the seconds reported are the seconds waited

import argparse
import copy
import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import data
import evaluate
import world
from dpo import dpo_loss, missing_mass, pair_logps, sequence_logps
from model import GPT, GPTConfig, atomic_save, load_model, save_model

SAVE_EVERY = 200             # steps between savings of what --resume continues from
LOG_EVERY = 10               # steps that one line of metrics.jsonl averages over

# --------------------------------------------------------------------------------------------------------------------
# Flags

TOY = {"tokenizer": "toy", "sft_epochs": 1, "sft_lr": 4e-3, "epochs": 2, "batch_size": 64, "lr": 1.5e-3, "beta": 1.0,
       "norm_weight": 0.15, "n_layer": 1, "n_embd": 64}
OWN = {"tokenizer": "toy", "sft_epochs": 2, "sft_lr": 2e-3, "epochs": 2, "batch_size": 16, "lr": 1e-3, "beta": 0.1,
       "norm_weight": 0.0, "n_layer": 1, "n_embd": 64}
SFT_TEXTS, SFT_BATCH = 48_000, 32       # the toy corpus


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = lambda flag: f"(default: {TOY[flag]:g} on the toy world, {OWN[flag]:g} with --data)"
    p.add_argument("--data", metavar="FILE", help="your preference pairs, .jsonl, .jsonl.gz or .json; without it, the toy world")
    p.add_argument("--tokenizer", choices=["toy", "gpt2"], default="toy",
                   help="toy: bytes and the toy world's words; gpt2: GPT-2's 50,257 tokens, shorter texts but a larger "
                        "model (default: toy)")
    p.add_argument("--init", metavar="WHERE", help="start from these weights instead of random ones: gpt2, gpt2-medium, a folder "
                   "with GPT-2 weights, or a checkpoint such as out/toy/sft.pt; with --sft-epochs 0 they are the reference")
    p.add_argument("--out-dir", metavar="DIR", type=Path, help="where everything is written (default: out/toy, or out/NAME "
                   "for --data NAME.jsonl); a folder that holds a run is never overwritten")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run of the same flags where it stopped")
    p.add_argument("--seed", type=int, default=0, help="decides data, split, weights and order; same seed, same machine, same run")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, else mps, else cpu")
    p.add_argument("--n-layer", type=int, help="transformer blocks: more is a stronger and slower model " + both("n_layer"))
    p.add_argument("--n-embd", type=int, help="channels, a multiple of 32 (a head has 32): more is stronger and slower " + both("n_embd"))
    p.add_argument("--sft-epochs", type=int, help="passes over the SFT texts: more fit them better, too many learn them by heart "
                   + both("sft_epochs"))
    p.add_argument("--sft-lr", type=float, help="peak learning rate of SFT: larger learns faster, too large diverges " + both("sft_lr"))
    p.add_argument("--pairs", type=int, default=40_000, help="toy preference pairs: more labels, less of their noise is learned "
                   "(default: %(default)s)")
    p.add_argument("--annotator", choices=list(world.ANNOTATORS), default="human", help="who labels the toy pairs (default: human)")
    p.add_argument("--beta", type=float, help="the leash: larger keeps the policy closer to the reference, smaller KL " + both("beta"))
    p.add_argument("--loss", choices=["sigmoid", "ipo", "hinge", "robust"], default="sigmoid",
                   help="sigmoid is DPO, Eq. 7; see dpo.dpo_loss (default: sigmoid)")
    p.add_argument("--label-smoothing", type=float, default=0.0, help="the share of labels believed to be flipped; larger trusts "
                   "them less (default: 0)")
    p.add_argument("--norm-weight", type=float, help="weight of dpo.missing_mass: larger keeps more of the policy on text like the "
                   "pairs and adds noise; 0 is plain DPO. Only for pairs that the reference wrote " + both("norm_weight"))
    p.add_argument("--nll-weight", type=float, default=0.0, help="weight of -log pi(chosen), as in RPO: larger protects the chosen "
                   "text's likelihood and pulls away from DPO's optimum (default: 0)")
    p.add_argument("--epochs", type=int, help="passes over the pairs: more fits them better and, in the end, their noise " + both("epochs"))
    p.add_argument("--batch-size", type=int, help="pairs a step: larger is less noise a step and fewer steps " + both("batch_size"))
    p.add_argument("--accumulate", type=int, default=1, help="parts that a batch is worked through in: larger needs less memory "
                   "and gives the same gradient (default: 1)")
    p.add_argument("--lr", type=float, help="peak learning rate of DPO: larger learns faster, too large diverges " + both("lr"))
    p.add_argument("--max-length", type=int, default=512, help="with --data, the longest pair in tokens; longer ones are left out, "
                   "and counted, never cut (default: 512)")
    args = p.parse_args(argv)
    for flag, default in (TOY if args.data is None else OWN).items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    if args.out_dir is None:
        args.out_dir = Path("out") / ("toy" if args.data is None else Path(args.data).name.split(".")[0])
    at_least = {"n_layer": 1, "n_embd": 32, "sft_epochs": 0, "epochs": 1, "batch_size": 1, "accumulate": 1, "pairs": 1,
                "max_length": 3, "nll_weight": 0, "norm_weight": 0}
    for flag, least in at_least.items():
        if getattr(args, flag) < least:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least {least}")
    if args.n_embd % 32:
        p.error(f"--n-embd {args.n_embd} must be a multiple of 32: a head has 32 channels")
    if args.data is None and args.tokenizer != "toy":
        p.error("--tokenizer gpt2 needs --data: the toy world is exact in its own tokens")
    if not args.init and args.sft_epochs == 0:
        p.error("--sft-epochs 0 needs --init: untrained weights are no reference")
    try:                                                       # the loss's own checks, before minutes of SFT
        dpo_loss(*torch.zeros(4, 1), beta=args.beta, loss_type=args.loss, label_smoothing=args.label_smoothing)
    except ValueError as error:
        p.error(str(error))
    return args


def pick_device(name):
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# --------------------------------------------------------------------------------------------------------------------
# The run's folder

class Log:
    """metrics.jsonl: one JSON object a line, appended as training goes. {"stage", "step", ...}"""

    def __init__(self, path):
        self.path = path

    def write(self, **record):
        with open(self.path, "a", encoding="utf-8", newline="\n") as f:
            f.write(json.dumps(record) + "\n")

    def forget_after(self, stage, step):
        """On resuming: drop the lines that the interrupted run wrote after its last saving; they will come again."""
        keep = [r for r in evaluate.read_jsonl(self.path) if r["stage"] != stage or r["step"] < step]
        beside = self.path.with_name(self.path.name + ".writing")
        beside.write_text("".join(json.dumps(r) + "\n" for r in keep), encoding="utf-8", newline="\n")
        os.replace(beside, self.path)


def prepare_out_dir(args):
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("resume", "out_dir", "device")}
    if args.data is not None:
        flags["data"] = str(Path(args.data).resolve())
        flags["data_sha256"] = evaluate.sha256(args.data)      # a run is continued and measured on the data it was begun with
    file = args.out_dir / "flags.json"
    if (args.out_dir / "summary.json").exists():
        raise SystemExit(f"{args.out_dir} holds a finished run, which is not overwritten. Look at it with: python evaluate.py "
                         f"{args.out_dir}\nTo train again, choose another --out-dir or remove that folder.")
    if file.exists():
        if not args.resume:
            raise SystemExit(f"{args.out_dir} holds an unfinished run. Continue it with --resume, choose another --out-dir, or "
                             "remove that folder.")
        before = json.loads(file.read_text(encoding="utf-8"))
        differ = [f"--{k.replace('_', '-')} was {before.get(k)!r}, is {flags[k]!r}" for k in flags if before.get(k) != flags[k]]
        if differ:
            raise SystemExit(f"--resume continues a run with the flags it was started with; in {args.out_dir} " + "; ".join(differ))
    elif args.resume:
        print(f"Nothing to resume in {args.out_dir}: starting from the beginning.")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    evaluate.write_json(flags, file)
    return Log(args.out_dir / "metrics.jsonl")


# --------------------------------------------------------------------------------------------------------------------
# One training loop, for SFT and for DPO

def lr_at(step, total, peak):
    """Linear warm-up over the first 3% of the steps, then a cosine down to 0."""
    warmup = max(1, round(0.03 * total))
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))


def fit(stage, model, lengths, loss_of, *, epochs, batch_size, lr, seed, accumulate, out_dir, log, bar_keys, at_step=None):
    """Minimise loss_of over all indices of lengths, epochs times.

    loss_of(indices) -> (loss, {name: value}): means over these indices, the loss with gradient. at_step(step, total): called
    before every step and after the last. AdamW, warm-up and cosine, gradients clipped to norm 10 (sums of a response's
    log-probabilities have larger gradients than means of tokens). Saves state.pt every SAVE_EVERY steps and continues from
    one that is there; since order and learning rate depend on the step alone, a continued run is the uninterrupted one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    plan = [b for e in range(epochs) for b in data.batches(lengths, batch_size, seed=seed * 1000 + e)]
    state_file, first = out_dir / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=next(model.parameters()).device, weights_only=True)
        if state["stage"] == stage:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
    log.forget_after(stage, first)
    sums, count, since = {}, 0, time.time()
    with tqdm(desc=f"{stage:>5}", unit="step", initial=first, total=len(plan), dynamic_ncols=True) as bar:
        for step in range(first, len(plan)):
            if step > first and step % SAVE_EVERY == 0:
                atomic_save({"stage": stage, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
                            state_file)
            if at_step:
                at_step(step, len(plan))
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, len(plan), lr)
            indices = plan[step]
            size = math.ceil(len(indices) / accumulate)
            for i in range(0, len(indices), size):
                part = indices[i:i + size]
                loss, values = loss_of(part)
                share = len(part) / len(indices)                   # so that accumulation gives the gradient of the mean
                (loss * share).backward()
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value.detach() * share
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            if not torch.isfinite(norm):
                raise SystemExit(f"{stage}, step {step}: the gradient is not finite. A smaller learning rate is the usual cure"
                                 f" (here {lr:g}). The state before is in {state_file}.")
            optimizer.step()
            optimizer.zero_grad()
            count += 1
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + norm
            bar.update()
            if step == 0 or (step + 1) % LOG_EVERY == 0 or step + 1 == len(plan):       # step 0 alone: before any update
                values = {k: float(v) / count for k, v in sums.items()}
                seconds = time.time() - since
                log.write(stage=stage, step=step, **values, lr=lr_at(step, len(plan), lr),
                          **{f"{'texts' if stage == 'sft' else 'pairs'}_per_second": count * len(indices) / seconds})
                bar.set_postfix({k.split("/")[-1]: f"{values[k]:.3f}" for k in bar_keys}, refresh=False)
                sums, count, since = {}, 0, time.time()
    if at_step:
        at_step(len(plan), len(plan))
    state_file.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# The stages

def train_sft(model, texts, args, log):
    """Maximum likelihood of the responses. texts: a list of (prompt ids, response ids)."""
    device = next(model.parameters()).device

    def loss_of(indices):
        tokens, mask = (t.to(device) for t in data.pad([texts[i][0] for i in indices], [texts[i][1] for i in indices]))
        # The mean over texts of a text's sum. A mean over tokens would weigh the texts of a batch of short ones more
        # than those of a batch of long ones, and the reference would come out terser than its corpus.
        loss = -sequence_logps(model, tokens, mask).mean()
        return loss, {"loss": loss}

    model.train()
    fit("sft", model, [len(x) + len(y) for x, y in texts], loss_of, epochs=args.sft_epochs,
        batch_size=SFT_BATCH if args.data is None else args.batch_size, lr=args.sft_lr, seed=args.seed,
        accumulate=args.accumulate, out_dir=args.out_dir, log=log, bar_keys=["loss"])


@torch.no_grad()
def reference_logps(reference, examples, batch_size, device):
    """log ref(y_w|x), log ref(y_l|x) of every example, two tensors (N,), in the examples' order.

    This is the fixed-model assumption at work: neither the data nor the reference will change, so one pass is enough, and
    training needs no second model in memory.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))            # like lengths together: little padding
    out = torch.empty(2, len(examples), device=device)
    for i in tqdm(range(0, len(order), batch_size), desc="  ref", unit="batch", dynamic_ncols=True):
        indices = order[i:i + batch_size]
        batch = {k: v.to(device) for k, v in data.collate([examples[j] for j in indices]).items()}
        out[:, indices] = torch.stack(pair_logps(reference, batch))
    return out[0], out[1]


def train_dpo(stage, policy, examples, ref_logps, args, log, norm_weight, nll_weight, at_step=None):
    """Minimise the DPO loss over a fixed set of pairs. ref_logps: what `reference_logps` returned for these examples."""
    # on the toy world the annotator's noise is known, and so how good an accuracy can be; it is logged beside each
    ceiling = {"rewards/ceiling": torch.tensor(evaluate.annotator_ceiling(args.annotator))} if args.data is None else {}
    device = next(policy.parameters()).device
    ref_chosen, ref_rejected = ref_logps

    def loss_of(indices):
        batch = {k: v.to(device) for k, v in data.collate([examples[i] for i in indices]).items()}
        chosen, rejected = pair_logps(policy, batch)                                                  # (B,), (B,)
        ref = ref_chosen[indices], ref_rejected[indices]                                              # (B,), (B,)
        losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *ref, beta=args.beta, loss_type=args.loss,
                                                            label_smoothing=args.label_smoothing)     # each (B,)
        missing = missing_mass(torch.cat([chosen, rejected]), torch.cat(ref))
        loss = losses.mean()
        if norm_weight:
            loss = loss + norm_weight * missing
        if nll_weight:
            loss = loss - nll_weight * chosen.mean()
        accuracy = (chosen_rewards > rejected_rewards) + 0.5 * (chosen_rewards == rejected_rewards)   # ties count 1/2
        return loss, {
            "loss": losses.mean(), "missing_mass": missing,
            "rewards/chosen": chosen_rewards.mean(), "rewards/rejected": rejected_rewards.mean(),
            "rewards/margins": (chosen_rewards - rejected_rewards).mean(), "rewards/accuracies": accuracy.mean(),
            "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean(), **ceiling}

    policy.eval()          # dropout off, as it was for the reference: with other masks the two would differ at step 0
    fit(stage, policy, [len(e) for e in examples], loss_of, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
        seed=args.seed, accumulate=args.accumulate, out_dir=args.out_dir, log=log, at_step=at_step,
        bar_keys=["loss", "rewards/accuracies", *ceiling, "rewards/margins"])


def toy_path(stage, policy, ref_logps, beta, log):
    """An at_step for `fit`: eight exact measurements of the policy on its way, for the figures."""
    def at_step(step, total):
        if step in {round(total * share) for share in (0, .01, .03, .07, .15, .3, .6, 1)}:
            row = evaluate.measure(evaluate.exact_logps(policy, world.prompts()[1]), ref_logps, beta)
            log.write(stage=stage, step=step, **row)
    return at_step


# --------------------------------------------------------------------------------------------------------------------
# The whole run

def load_texts(args, tokenizer):
    """(SFT texts, pairs' examples), in tokens, and what was left out is said."""
    eos = tokenizer.eot_token
    if args.data is None:
        encode = {t: tokenizer.encode_ordinary(t) for t in sum(world.prompts(), []) + world.responses()}
        texts = [(encode[x], encode[y] + [eos]) for x, y in data.make_sft_corpus(SFT_TEXTS, args.seed)]
        examples, _ = data.tokenize(data.make_preferences(args.pairs, args.annotator, args.seed), tokenizer)
        return texts, examples
    train, held_out, equal = data.load_split(args.data, args.seed)
    print(f"{args.data}: {len(train) + len(held_out) + len(equal)} pairs; {len(train)} to train on, {len(held_out)} held out "
          "(by prompt)")
    if equal:
        print(f"Left out: {len(equal)} rows have chosen == rejected and can teach nothing ({equal[0].where}"
              + (", ..." if len(equal) > 1 else "") + ")")
    for name, pairs in (("train", train), ("held-out", held_out)):
        kept, too_long = data.tokenize(pairs, tokenizer, args.max_length)
        if too_long:
            print(f"Left out: {len(too_long)} {name} pairs are longer than --max-length {args.max_length} tokens "
                  f"({too_long[0].where}" + (", ..." if len(too_long) > 1 else "") + ")")
        if not kept:
            raise data.DataError(f"{args.data}: no {name} pair is left. Raise --max-length or bring more pairs.")
        if name == "train":
            examples = kept
    # no SFT texts are given, so the reference is fitted to the chosen responses, as the paper does (section 4, outline)
    return [(e.prompt, e.chosen) for e in examples], examples


def start_model(args, tokenizer, texts_longest):
    if args.init is None:
        block = 64 if args.data is None else 32 * math.ceil(texts_longest / 32)
        model = GPT(GPTConfig(block_size=block, vocab_size=tokenizer.n_vocab, n_layer=args.n_layer, n_head=args.n_embd // 32,
                              n_embd=args.n_embd))
    else:
        try:
            model = load_model(args.init)[0] if str(args.init).endswith(".pt") else GPT.from_pretrained(args.init)
        except (ValueError, OSError) as error:
            raise SystemExit(f"--init: {error}") from error
    if model.config.vocab_size != tokenizer.n_vocab:
        raise SystemExit(f"--init {args.init} has {model.config.vocab_size} tokens, --tokenizer {args.tokenizer} has "
                         f"{tokenizer.n_vocab}: they do not belong together")
    if model.config.block_size < texts_longest:
        raise SystemExit(f"--init {args.init} reads {model.config.block_size} tokens, the longest pair has {texts_longest}: "
                         f"set --max-length {model.config.block_size}")
    return model


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    log = prepare_out_dir(args)
    torch.manual_seed(args.seed)
    tokenizer = data.get_tokenizer(args.tokenizer)
    texts, examples = load_texts(args, tokenizer)

    # 1. The reference: supervised fine-tuning.
    sft_file = args.out_dir / "sft.pt"
    if sft_file.exists():
        reference, _ = load_model(sft_file, device)
    else:
        reference = start_model(args, tokenizer, max(map(len, examples))).to(device)
        size = sum(p.numel() for p in reference.parameters())
        print(f"Model: {size:,} parameters on {device}. SFT on {len(texts):,} texts, then DPO on {len(examples):,} pairs, "
              f"beta = {args.beta:g}.")
        if args.sft_epochs:
            train_sft(reference, texts, args, log)
        save_model(reference, sft_file, tokenizer=args.tokenizer)
    reference.eval().requires_grad_(False)

    # 2. What the reference thinks of the data, once and for all.
    ref_logps = reference_logps(reference, examples, 512 if args.data is None else args.batch_size, device)

    # 3. DPO, and on the toy world plain DPO beside it, from the same reference on the same pairs in the same order.
    stages = [("dpo", args.norm_weight, args.nll_weight)]
    if args.data is None and (args.norm_weight or args.nll_weight):
        stages.insert(0, ("plain", 0.0, 0.0))
    for stage, norm_weight, nll_weight in stages:
        file = args.out_dir / f"{stage}.pt"
        if file.exists():
            continue
        policy = copy.deepcopy(reference).requires_grad_(True)     # its own weights: the reference must not move with it
        at_step = None
        if args.data is None:
            at_step = toy_path(stage, policy, evaluate.exact_logps(reference, world.prompts()[1]), args.beta, log)
        train_dpo(stage, policy, examples, ref_logps, args, log, norm_weight, nll_weight, at_step)
        save_model(policy, file, tokenizer=args.tokenizer, reference=evaluate.fingerprint(reference))

    # 4. How good is it?
    summary = evaluate.report(args.out_dir, device)
    summary["seconds"] = time.time() - START
    evaluate.write_json(summary, args.out_dir / "summary.json")
    print(f"Done in {summary['seconds']:.0f} s.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")       # a sample may hold a character that the terminal lacks
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command with --resume continues.")
