"""The flags of train.py."""
import argparse
from pathlib import Path

import torch

import world
from losses import LOSSES, SMOOTHED
from support.tokenizers import TOKENIZERS

# What a flag is where it is not given: on the toy world, and with --data.
TOY = {"sft_epochs": 1, "sft_lr": 4e-3, "epochs": 2, "batch_size": 64, "lr": 1.5e-3,
       "beta": 1.0, "norm_weight": 0.15, "n_layer": 1, "n_embd": 64}
OWN = {"sft_epochs": 2, "sft_lr": 2e-3, "epochs": 2, "batch_size": 16, "lr": 1e-3,
       "beta": 0.1, "norm_weight": 0.0, "n_layer": 1, "n_embd": 64}
AT_LEAST = {"n_layer": 1, "n_embd": 32, "sft_epochs": 0, "epochs": 1, "batch_size": 1,
            "accumulate": 1, "pairs": 1, "max_length": 3, "nll_weight": 0, "norm_weight": 0}
NOT_KEPT = ("resume", "out_dir", "device")  # these do not decide what a run's result is

# A flag's help, for the flags of TOY and OWN.
HELP = {
    "n_layer": "transformer blocks; more is a stronger and slower model",
    "n_embd": "channels, a multiple of 32; more is a stronger and slower model",
    "sft_epochs": "passes over the SFT texts; too many learn the texts by heart",
    "sft_lr": "peak learning rate of SFT; larger learns faster, too large diverges",
    "beta": "the leash; a larger beta keeps the policy closer to the reference",
    "norm_weight": "weight of losses.missing_mass; larger keeps more of the policy on text like "
                   "the pairs, and adds noise; only for pairs that the reference wrote",
    "epochs": "passes over the pairs; many of them learn the labels' noise",
    "batch_size": "pairs a step; a larger batch gives fewer steps with less noise",
    "lr": "peak learning rate of DPO; larger learns faster, too large diverges",
}


def make_parser(description):
    p = argparse.ArgumentParser(description=description,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", metavar="FILE", help="your preference pairs (default: the toy world)")
    add("--tokenizer", choices=list(TOKENIZERS), default="toy",
        help="toy: bytes and the toy world's words; gpt2: GPT-2's 50,257 tokens, for which texts "
             "are shorter and the model is larger (default: toy)")
    add("--init", metavar="WHERE",
        help="start from these weights: gpt2, gpt2-medium, a folder with GPT-2 weights, or a "
             "checkpoint such as out/toy/sft.pt; with --sft-epochs 0 they are the reference")
    add("--out-dir", metavar="DIR", type=Path,
        help="where everything is written; a run is never overwritten (default: out/toy, or "
             "out/NAME for --data NAME.jsonl)")
    add("--resume", action="store_true", help="continue an interrupted run of the same flags")
    add("--seed", type=int, default=0,
        help="decides data, split, weights and order; same seed, same machine, same run")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto: cuda, else mps, else cpu (default: auto)")
    add("--pairs", type=int, default=40_000,
        help="toy preference pairs; more of them teach less label noise (default: %(default)s)")
    add("--annotator", choices=list(world.ANNOTATORS), default="human",
        help="who labels the toy pairs (default: human)")
    add("--loss", choices=list(LOSSES), default="sigmoid",
        help="sigmoid is DPO, Eq. 7; for the others see losses.py (default: sigmoid)")
    add("--label-smoothing", type=float, default=0.0,
        help="for cdpo and robust: the share of labels that is believed to be flipped")
    add("--nll-weight", type=float, default=0.0,
        help="weight of -log pi(chosen), as in RPO; larger protects the likelihood of chosen "
             "text and pulls away from DPO's optimum (default: 0)")
    add("--accumulate", type=int, default=1,
        help="the parts that a batch is worked through in; more parts need less memory and give "
             "the same gradient (default: 1)")
    add("--max-length", type=int, default=512,
        help="with --data, the longest pair in tokens; longer ones are left out and counted "
             "(default: 512)")
    for name, text in HELP.items():
        default = f"(default: {TOY[name]:g} on the toy world, {OWN[name]:g} with --data)"
        add(f"--{name.replace('_', '-')}", type=type(TOY[name]), help=f"{text} {default}")
    return p


def parse_args(argv=None, description=None):
    """The flags of train.py, checked, with every default filled in. An argparse.Namespace."""
    p = make_parser(description)
    args = p.parse_args(argv)
    toy = args.data is None
    for name, default in (TOY if toy else OWN).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.out_dir is None:
        args.out_dir = Path("out") / ("toy" if toy else Path(args.data).name.split(".")[0])
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if value < least:
            p.error(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.n_embd % 32:
        p.error(f"--n-embd {args.n_embd} must be a multiple of 32: a head has 32 channels")
    if toy and args.tokenizer != "toy":
        p.error(f"--tokenizer {args.tokenizer} needs --data: the toy world is exact in its own "
                "tokens")
    if not args.init and args.sft_epochs == 0:
        p.error("--sft-epochs 0 needs --init: untrained weights are no reference")
    if args.label_smoothing and args.loss not in SMOOTHED:
        p.error(f"--label-smoothing is not defined for --loss {args.loss}; "
                "use --loss cdpo or robust")
    try:  # the loss's own checks, before minutes of SFT
        loss_options = {"label_smoothing": args.label_smoothing} if args.loss in SMOOTHED else {}
        LOSSES[args.loss](*torch.zeros(4, 1), args.beta, **loss_options)
    except ValueError as error:
        p.error(str(error))
    return args


def kept(args):
    """The flags that decide what a run's result is, a dict of plain values."""
    return {name: value for name, value in vars(args).items() if name not in NOT_KEPT}


def dpo_settings(flags):
    """The keyword arguments of train.train_dpo that stand in a run's flags, a dict."""
    names = ("beta", "loss", "label_smoothing", "norm_weight", "nll_weight", "epochs",
             "batch_size", "lr", "seed", "accumulate")
    return {name: flags[name] for name in names}
