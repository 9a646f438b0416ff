"""How fast is DPO here, and how fast beside TRL? `python -m lab.bench`

A step is a whole one of `train.train_dpo`: collate, forward, backward, clip, AdamW. The reference's
log-probabilities are there already. Weights and tokens are random. A text of `generate` has 64 new
tokens, and 64 texts are made at once, with a cache.

A machine's speed changes from second to second. So each side is a process that waits for its turn,
takes k steps, and waits again. A ratio is that of two times within one turn. Figures are medians
over all turns, with quartiles in brackets.

TRL and transformers need an environment of their own. This makes one (on Windows Scripts, not bin):

    python -m venv out/trl
    out/trl/bin/python -m pip install -r requirements.txt trl==1.16.0
    python -m lab.bench --trl-python out/trl/bin/python --against trl transformers
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import train
from lab.export import write_model
from lab.sides import BETA, LR, NEW, STEPS, TEXTS, since
from model import GPT, GPTConfig
from support import command, flags, machine
from support.files import write_json

SIZES = {"n_layer": "blocks", "n_embd": "channels", "n_head": "attention heads",
         "vocab": "tokens in the vocabulary", "prompt": "tokens a prompt",
         "response": "tokens a response", "pairs": "pairs a step"}
SHAPES = {"toy": (4, 128, 4, 512, 16, 24, 32), "small": (6, 384, 6, 512, 64, 64, 8),
          "gpt2": (12, 768, 12, 50_257, 128, 128, 2), "long": (6, 384, 6, 512, 192, 32, 8)}
WARM, TURN = 2, 1.0  # turns that are not timed; the seconds that any other takes at least
SQUARE = {"cpu": 1024, "mps": 4096, "cuda": 8192}  # the sides of a large matrix, for each device
OURS = "here"
# What TRL is told so that it computes the same as we do, and writes nothing.
AS_IT_COMES = {"learning_rate": LR, "lr_scheduler_type": "constant", "adam_beta2": 0.95,
               "max_grad_norm": train.CLIP, "beta": BETA, "max_steps": 1_000_000,
               "train_sampling_strategy": "sequential", "max_length": None,
               "report_to": "none", "save_strategy": "no"}
# What makes it faster. AdamW is fused already; padding_free does nothing in 1.16.
AT_ITS_BEST = AS_IT_COMES | {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
SIDES = {  # for each kind of work: the sides, each a function of lab/sides.py with its settings
    "dpo": {OURS: ("dpo", {}), "TRL as it comes": ("trl", AS_IT_COMES),
            "TRL at its best": ("trl", AT_ITS_BEST)},
    "generate": {OURS: ("generate", {}), "transformers": ("transformers", {})}}


# ---- What has to be computed, and figures from times

def flops(shape, tokens, scored, seen):
    """Operations of a forward pass. scored: tokens after which the head runs. seen: (query, key)
    pairs of the attention."""
    layers, width = shape["n_layer"], shape["n_embd"]
    matrices = 12 * layers * width ** 2 * tokens + shape["vocab"] * width * scored
    attention = 2 * layers * width * seen  # a query times a key, and a weight times a value
    return 2 * (matrices + attention)  # a multiplication and an addition


def useful_flops(shape, kind):
    """The least number of operations for a pair, or a text. Of a pair the prompt is read once. The
    last token of a response predicts nothing."""
    p, r, n = shape["prompt"], shape["response"], 2
    if kind == "generate":
        r, n = NEW, 1
    read = r - 1  # of a response
    seen = p * (p + 1) // 2 + n * (read * p + read * r // 2)  # a token sees no later one
    once = flops(shape, p + n * read, n * r, seen)
    # backward: a product for the gradient of the weights, and one for that of the states
    return once if kind == "generate" else 3 * once


def spread(values):
    """[lower quartile, median, upper quartile]"""
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist()


def figures(turns, rates, items, tokens, operations):
    """{side: its figures}. turns: {side: an answer of `orders` for each turn}. rates: what the
    machine does in a second, for each turn. items, tokens, operations: of a turn."""
    out, seconds, losses = {}, {}, {}
    for side, answers in turns.items():
        seconds[side] = np.array([answer["seconds"] for answer in answers[WARM:]])
        losses[side] = np.concatenate([answer["losses"] for answer in answers])[:STEPS]
    for side, own in seconds.items():
        compared = min(len(losses[side]), len(losses[OURS]))
        theirs, ours = losses[side][:compared], losses[OURS][:compared]
        out[side] = {
            "per_second": spread(items / own), "tokens_per_second": spread(tokens / own),
            "share_of_peak": spread(operations / own / rates[WARM:]),
            "times_as_fast_here": spread(own / seconds[OURS]),
            "peak_memory": turns[side][-1]["memory"], "losses_compared": compared,
            "loss_difference": max(abs(ours / theirs - 1), default=0.0)}
    return out


# ---- Taking turns

def start(side, settings, task, python, folder):
    """Start the process of a side: (its log, the process)."""
    folder.mkdir(parents=True)
    words = json.dumps(task | {"side": side, "settings": settings, "folder": str(folder)})
    code = "from lab import sides; sides.work()"
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder)}  # nothing is left, or loaded
    with open(folder / "log", "w", encoding="utf-8") as log:
        return folder / "log", subprocess.Popen(
            [python, "-c", code, words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True, env=os.environ | own, cwd=Path(__file__).parent.parent)


def take_turns(kind, task, args, folder):
    """({side: its answers}, the machine's rates, k). The first WARM turns are of one step, the
    others of k."""
    processes, rates, begun, k = {}, [], time.time(), 1
    try:
        for name, (side, settings) in SIDES[kind].items():
            if side in (kind, *args.against):
                python = sys.executable if name == OURS else args.trl_python
                processes[name] = start(side, settings, task, python, folder / kind / name)
        answers = {name: [] for name in processes}
        for turn in tqdm(range(WARM + args.repeats), kind, unit="turn", dynamic_ncols=True):
            if turn > WARM and time.time() - begun > args.seconds:
                break
            for name in sorted(processes, reverse=turn % 2):  # nobody is always the first
                answers[name].append(order(k, *processes[name]))
            rates.append(matrix_rate(task["device"], task["dtype"]))
            if turn == WARM - 1:
                least = (STEPS - WARM) / args.repeats if kind == "dpo" else 1
                k = math.ceil(max(TURN / answers[OURS][-1]["seconds"], least))
    finally:
        for _, process in processes.values():
            process.kill()
            process.communicate()
    return answers, np.array(rates), k


def order(k, log, process):
    """Let a side take k steps. Its answer, a dict."""
    print(k, file=process.stdin, flush=True)
    if answer := process.stdout.readline():
        return json.loads(answer)
    said = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
    raise SystemExit(f"A side has ended before its time. Its last words: {said[-1]}")


def matrix_rate(device, dtype):
    """Operations a second of a large matrix product, the best of three."""
    n, seconds = SQUARE[device], []
    a = torch.ones(n, n, dtype=getattr(torch, dtype), device=device)
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        seconds.append(since(start, device))
    return 2 * n ** 3 / min(seconds)


def measure(shape, args, folder):
    """{"dpo", "generate": figures} of a shape."""
    config = GPTConfig(shape["prompt"] + max(shape["response"], NEW), shape["vocab"],
                       shape["n_layer"], shape["n_head"], shape["n_embd"])
    torch.manual_seed(0)
    write_model(GPT(config), data.get_tokenizer("toy"), folder / "weights")
    task = {"shape": shape, "device": args.device, "dtype": args.dtype, "threads": args.threads,
            "weights": str(folder / "weights")}
    counts = {"dpo": (shape["pairs"], shape["prompt"] + 2 * shape["response"]),
              "generate": (TEXTS, NEW)}
    out = {}
    for kind in args.work:
        items, tokens = counts[kind]
        answers, rates, k = take_turns(kind, task, args, folder)
        out[kind] = figures(answers, rates, k * items, k * items * tokens,
                            k * items * useful_flops(shape, kind))
    return out


# ---- The command

def table(name, result):
    """The figures of a shape, text."""
    lines = [f"{name:<29}{'pairs or texts a second':>27}{'tokens/s':>10}{'GB':>7}{'of peak':>9}"
             f"{'times as fast here':>20}{'losses differ (steps)':>23}"]
    for kind, sides in result.items():
        for side, row in sides.items():
            rate = "{1:.4g} [{0:.4g}, {2:.4g}]".format(*row["per_second"])
            faster = "{1:.2f} [{0:.2f}, {2:.2f}]".format(*row["times_as_fast_here"])
            memory = (row["peak_memory"] or math.nan) / 1e9
            steps = row["losses_compared"]
            differ = f"{row['loss_difference']:.0e} ({steps})" if steps else ""
            lines.append(f"{kind:<11}{side:<18}{rate:>27}{row['tokens_per_second'][1]:>10,.0f}"
                         f"{memory:>7.2f}{row['share_of_peak'][1]:>9.0%}{faster:>20}"
                         f"{differ:>23}")
    return "\n".join(lines)


def draw(results, path):
    """The figure of the comparisons: how many times as fast a step is here, with quartiles."""
    from support import figures  # only here: it chooses matplotlib's backend
    plt, sides = figures.plt, {"TRL as it comes": "#56B4E9", "TRL at its best": "#0072B2"}
    fig, ax = plt.subplots(figsize=(6, 1 + 0.7 * len(results)), layout="constrained")
    for i, (side, colour) in enumerate(sides.items()):
        low, middle, high = zip(*(shape["dpo"][side]["times_as_fast_here"]
                                  for shape in results.values()))
        y = np.arange(len(results)) + 0.36 * i
        ax.barh(y, middle, 0.34, color=colour, label=f"against {side}",
                xerr=[np.subtract(middle, low), np.subtract(high, middle)])
        for where, value in zip(y, middle):
            ax.text(0.05, where, f"{value:.2f}", va="center", color="black" if i == 0 else "white")
    ax.axvline(1, color="black", lw=1)
    ax.set_yticks(np.arange(len(results)) + 0.18, list(results))
    ax.invert_yaxis()
    ax.set_xlabel("times as fast here: the time of a DPO step there / here (1 is equal)")
    fig.legend(loc="outside upper center", ncols=2)
    figures.save(fig, path)


def python_with_trl(text):
    """An argparse type: the path of a python that has TRL."""
    code = "from importlib.metadata import version; version('trl')"
    try:
        subprocess.run([text, "-c", code], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise argparse.ArgumentTypeError(f"{text!r} is no python that has TRL; python -m "
                                         "lab.bench --help says how to make one") from None
    return os.path.abspath(shutil.which(text))  # sides run in another folder


def json_file(text):
    """An argparse type: the Path of a file to write."""
    flags.writable(str(Path(text).absolute().parent))
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file, such as bench.json")
    return Path(text)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, number = parser.add_argument, flags.number
    add("--shapes", nargs="+", choices=list(SHAPES), default=["toy", "small"],
        help="default: toy small; gpt2 takes minutes")
    for name, meaning in SIZES.items():
        add(flags.dashed(name), type=number(*flags.RANGE.get(name, (int, 1, 1_000_000))),
            help=f"other {meaning}")
    add("--work", nargs="+", choices=list(SIDES), default=list(SIDES),
        help="what to measure (default: dpo generate)")
    add("--against", nargs="+", choices=["trl", "transformers"], default=[],
        help="measure TRL's DPOTrainer too, or transformers' generate")
    add("--trl-python", metavar="PATH", type=python_with_trl, help="the python that has them")
    add("--repeats", type=number(int, 1, 100), default=9, help="turns of each side (default: 9)")
    add("--seconds", type=number(int, 1, 86_400), default=900,
        help="after so many no turn begins, neither of DPO nor of generate (default: 900)")
    add("--threads", type=number(int, 1, 1024), default=torch.get_num_threads(),
        help="of a process (default: as many as PyTorch takes)")
    add("--device", metavar="{auto,cpu,cuda,mps}", type=machine.device, default="auto")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all sides")
    add("--json", metavar="FILE", type=json_file, help="a file for all figures, and beside it, "
        "with --against trl, a drawing of them (.png)")
    args = parser.parse_args(argv)
    args.device = machine.pick_device(args.device)
    if args.against and not args.trl_python:
        parser.error("--against needs --trl-python, the python that has TRL and transformers")
    if args.dtype == "bfloat16" and not machine.has_bfloat16(args.device):
        parser.error(f"--dtype bfloat16: {args.device} has none; use --dtype float32")
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name)}
    args.sizes = {name: dict(zip(SIZES, SHAPES[name])) | given for name in args.shapes}
    for shape in args.sizes.values():
        if shape["n_embd"] % shape["n_head"]:
            parser.error(f"--n-embd {shape['n_embd']} must be a multiple of --n-head "
                         f"{shape['n_head']}")
    return args


def main(argv=None):
    args, results = parse_args(argv), {}
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} threads, {args.dtype}. AdamW, learning rate {LR}, beta "
          f"{BETA}, clipped at {train.CLIP:g}.")
    if "trl" in args.against:
        print(f"TRL as it comes: {AS_IT_COMES}\nTRL at its best: {AT_ITS_BEST}")
    for name, shape in args.sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(shape, args, Path(folder))
        if args.json:
            write_json({"device": args.device, "threads": args.threads, "dtype": args.dtype,
                        "trl": [AS_IT_COMES, AT_ITS_BEST], "sizes": args.sizes,
                        "results": results}, args.json)
            if "trl" in args.against and "dpo" in args.work:
                draw(results, args.json.with_suffix(".png"))
    for name, result in results.items():
        sizes = ", ".join(f"{args.sizes[name][key]:,} {meaning}" for key, meaning in SIZES.items())
        print(f"\n{table(name, result)}\n{name}: {sizes}")
    print("\nCompare what was measured within one turn: times as fast. Rates change with the "
          "machine's load.\nTokens: a prompt once, and its responses. GB: the most that a process "
          "held. Of peak: the operations\nthat are needed, as a share of what a large matrix "
          "product reaches in the same second.")


if __name__ == "__main__":
    command.run(main, again="The same command starts again.")
