"""The flags of train.py, and numbers in a range for every command's flags."""
import argparse
import tempfile
from argparse import ArgumentTypeError
from pathlib import Path

import world
from losses import LOSSES, SMOOTHED
from support import machine
from support.tokenizers import TOKENIZERS

# What a flag is where it is not given: on the toy world, and with --data.
TOY = {"sft_epochs": 1, "sft_lr": 4e-3, "epochs": 2, "batch_size": 64, "lr": 1.5e-3,
       "beta": 1.0, "stray_weight": 1.0, "n_layer": 1, "n_embd": 64}
OWN = {"sft_epochs": 2, "sft_lr": 2e-3, "epochs": 2, "batch_size": 16, "lr": 1e-3,
       "beta": 0.1, "stray_weight": 0.0, "n_layer": 1, "n_embd": 64}
# flags that only one of the two has
TOY_ALONE = {"pairs": 40_000, "annotator": "human"}
OWN_ALONE = {"max_length": 512, "skip_bad_rows": False}
NOT_KEPT = ("resume", "out_dir", "device", "recompute")  # they do not decide a run's result
RESERVED = {"CON", "PRN", "AUX", "NUL"}  # Windows keeps these names for itself
DATASET = ("state.json", "dataset_dict.json")  # one of them is in a folder of `datasets`

# A flag's help, for the flags of TOY and OWN.
HELP = {
    "n_layer": "transformer blocks; more is a stronger and slower model",
    "n_embd": "channels, a multiple of 32; more is a stronger and slower model",
    "sft_epochs": "passes over the SFT texts; too many learn the texts by heart",
    "sft_lr": "peak learning rate of SFT; larger learns faster, too large diverges",
    "beta": "the leash; a larger beta keeps the policy closer to the reference",
    "stray_weight": "weight of losses.stray_mass; larger keeps the policy closer to text that the "
                    "reference could write",
    "epochs": "passes over the pairs; many of them learn the labels' noise",
    "batch_size": "pairs a step; a larger batch gives fewer steps with less noise",
    "lr": "peak learning rate of DPO; larger learns faster, too large diverges",
}


# The least and the greatest value of each number. The loss is finite for every such beta. Below a
# beta or a rate of 1e-9 nothing is learned: Adam adds 1e-8 to each gradient's size and divides by
# it. At a rate above 1 a step is larger than any weight.
RANGE = {
    "n_layer": (int, 1, 200), "n_embd": (int, 32, 16_384),
    "sft_epochs": (int, 0, 1000), "epochs": (int, 1, 1000),
    "batch_size": (int, 1, 1_000_000), "accumulate": (int, 1, 1_000_000),
    "sft_lr": (float, 1e-9, 1), "lr": (float, 1e-9, 1), "beta": (float, 1e-9, 1e9),
    "stray_weight": (float, 0, 1e6), "nll_weight": (float, 0, 1e6),
    "label_smoothing": (float, 0, 0.49), "seed": (int, 0, 2 ** 32 - 1),
    "pairs": (int, 1, 10_000_000), "max_length": (int, 3, 1_000_000),
}


# ---- Types for argparse: each says what is wrong with the text that the user gave

def number(kind, low, high):
    """An int or a float (kind) from low to high, both included."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ArgumentTypeError(f"{text!r} is not {what}") from None
        if not value >= low:  # so nan is refused
            raise ArgumentTypeError(f"{text} must be at least {low}")
        if value > high:
            raise ArgumentTypeError(f"{text} must be at most {high}")
        return value
    return convert


def pairs_file(text):
    """The path of a file that can be read, or of a folder that `datasets` has written, a text."""
    path = Path(text)
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise ArgumentTypeError(f"{text!r} is a pipe or a device; it must be a file, since it "
                                    "is read more than once")
        if not path.is_dir():
            open(path, "rb").close()
        elif not any((path / name).exists() for name in DATASET):
            raise ArgumentTypeError(f"{text!r} is a folder without a dataset; name a file such as "
                                    "mine.jsonl, or what Dataset.save_to_disk has written")
    except OSError as error:
        raise ArgumentTypeError(f"{text} cannot be read ({error.strerror})") from error
    return text


def weights(text):
    """A name in machine.GPT2, or the path of a folder or a checkpoint, a text."""
    try:
        if text.endswith(".pt"):
            open(text, "rb").close()
        elif text not in machine.GPT2 and not (Path(text) / "config.json").exists():
            raise ArgumentTypeError(f"{text!r} is not a checkpoint (NAME.pt), a folder with a "
                                    f"config.json, or one of {', '.join(machine.GPT2)}")
    except OSError as error:
        raise ArgumentTypeError(f"{text} cannot be read ({error.strerror})") from error
    return text


def writable(text):
    """The Path of a folder to write to. It is tried in a temporary folder, which is removed."""
    path = Path(text)
    if not text.strip() or path.name.split(".")[0].upper() in RESERVED:
        raise ArgumentTypeError(f"{text!r} is no name for a folder; choose another one")
    try:
        there = next(p for p in (path, *path.parents) if p.exists())
        with tempfile.TemporaryDirectory(dir=there) as trial:
            (trial / path.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"{text} cannot be written to ({error.strerror}); choose another "
                                "folder") from error
    return path


# ---- The flags of train.py

def dashed(name):
    return f"--{name.replace('_', '-')}"


def make_parser(description):
    p = argparse.ArgumentParser(description=description,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument

    def add_number(name, **settings):
        add(dashed(name), type=number(*RANGE[name]), **settings)
    add("--data", metavar="FILE", type=pairs_file,
        help="your preference pairs (default: the toy world)")
    add("--skip-bad-rows", action="store_true", default=None,
        help="with --data, rows that cannot be used are left out and counted; without it, they "
             "end the run before any training")
    add("--tokenizer", choices=list(TOKENIZERS), default="toy",
        help="toy: bytes and the toy world's words; gpt2: GPT-2's 50,257 tokens, for which texts "
             "are shorter and the model is larger (default: toy)")
    add("--init", metavar="WHERE", type=weights,
        help="start from these weights: gpt2, gpt2-medium, a folder with GPT-2 weights, or a "
             "checkpoint such as out/toy/sft.pt; with --sft-epochs 0 they are the reference")
    add("--out-dir", metavar="DIR", type=writable,
        help="where everything is written; a run is never overwritten (default: out/toy, or "
             "out/NAME for --data NAME.jsonl)")
    add("--resume", action="store_true", help="continue an interrupted run of the same flags")
    add_number("seed", default=0,
               help="decides data, split, weights and order; same seed, same machine, same run")
    add("--device", metavar="{auto,cpu,cuda,mps}", type=machine.device, default="auto",
        help="auto: cuda, else mps, else cpu (default: auto)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="what a model computes in; bfloat16 is faster and needs less memory, float32 is more "
             "exact. Weights, log-probabilities and losses are float32 in both. auto: bfloat16 "
             "with --data on a GPU that has it, else float32 (default: auto)")
    add_number("pairs",
               help="toy preference pairs; more of them teach less label noise (default: "
                    f"{TOY_ALONE['pairs']})")
    add("--annotator", choices=list(world.ANNOTATORS),
        help=f"who labels the toy pairs (default: {TOY_ALONE['annotator']})")
    add("--loss", choices=list(LOSSES), default="sigmoid",
        help="sigmoid is DPO, Eq. 7; for the others see losses.py (default: sigmoid)")
    add_number("label_smoothing", default=0.0,
               help="for cdpo and robust: the share of labels that is believed to be flipped")
    add_number("nll_weight", default=0.0,
               help="weight of -log pi(chosen), as in RPO; larger protects the likelihood of "
                    "chosen text and pulls away from DPO's optimum (default: 0)")
    add_number("accumulate", default=1,
               help="the parts that a batch is worked through in; more parts need less memory and "
                    "give the same gradient (default: 1)")
    add("--recompute", action="store_true",
        help="each block computes its states again for the gradient: a third more time, the same "
             "result, and far less memory for a deep model")
    add_number("max_length",
               help="with --data, the longest pair in tokens; longer ones are left out and "
                    f"counted (default: {OWN_ALONE['max_length']})")
    for name, text in HELP.items():
        default = f"(default: {TOY[name]:g} on the toy world, {OWN[name]:g} with --data)"
        add_number(name, help=f"{text} {default}")
    return p


def parse_args(argv=None, description=None):
    """The flags of train.py, checked, with every default filled in. An argparse.Namespace."""
    p = make_parser(description)
    args = p.parse_args(argv)
    toy = args.data is None
    given = {name for name, value in vars(args).items() if value is not None}
    for name, default in (TOY_ALONE | OWN_ALONE | (TOY if toy else OWN)).items():
        if name not in given:
            setattr(args, name, default)
    device = machine.pick_device(args.device)
    if args.dtype == "auto":
        fast = not toy and device == "cuda" and machine.has_bfloat16(device)
        args.dtype = "bfloat16" if fast else "float32"
    try:
        if args.out_dir is None:
            name = "toy" if toy else Path(args.data).name.split(".")[0]
            args.out_dir = writable(f"out/{name}" if name else "")
        check_together(args, given, device)
        machine.check(args, device)
    except (ArgumentTypeError, ValueError) as error:
        p.error(str(error))
    return args


def check_together(args, given, device):
    """Raises ValueError for flags that do not go together. given: the names of the flags that have
    a value before defaults are filled in."""
    toy = args.data is None
    for names, ignored, why in (
            (OWN_ALONE, toy, "needs --data"),
            (TOY_ALONE, not toy, "is about the toy world: leave it out with --data"),
            (("n_layer", "n_embd"), args.init, "has no effect with --init: those weights have "
                                               "their own size"),
            (("sft_lr",), args.sft_epochs == 0, "has no effect with --sft-epochs 0")):
        for name in names:
            if ignored and name in given:
                raise ValueError(f"{dashed(name)} {why}")
    if args.n_embd % 32:
        raise ValueError(f"--n-embd {args.n_embd} must be a multiple of 32: a head has 32 channels")
    if args.accumulate > args.batch_size:
        raise ValueError(f"--accumulate {args.accumulate} must be at most --batch-size "
                         f"{args.batch_size}: a part holds a pair at least")
    if toy and args.tokenizer != "toy":
        raise ValueError(f"--tokenizer {args.tokenizer} needs --data: the toy world is exact in "
                         "its own tokens")
    if args.init in machine.GPT2 and args.tokenizer != "gpt2":
        raise ValueError(f"--init {args.init} needs --data and --tokenizer gpt2: it reads no other "
                         "tokens")
    if args.init is None and args.sft_epochs == 0:
        raise ValueError("--sft-epochs 0 needs --init: untrained weights are no reference")
    if args.dtype == "bfloat16" and not machine.has_bfloat16(device):
        raise ValueError(f"--dtype bfloat16: {device} has none; use --dtype float32")
    if args.label_smoothing and args.loss not in SMOOTHED:
        raise ValueError(f"--label-smoothing is not defined for --loss {args.loss}; "
                         "use --loss cdpo or robust")


def kept(args):
    """The flags that decide what a run's result is, a dict of plain values."""
    return {name: value for name, value in vars(args).items() if name not in NOT_KEPT}


def dpo_settings(flags):
    """The keyword arguments of train.train_dpo that stand in a run's flags, a dict."""
    names = ("beta", "loss", "label_smoothing", "stray_weight", "nll_weight", "epochs",
             "batch_size", "lr", "seed", "accumulate")
    return {name: flags[name] for name in names}
