"""What does a step of DPO cost when a batch, a response or the model becomes larger?

    python -m lab.doubling     about eight minutes on 2 cores; writes doubling.json and doubling.png

The shape "small" of lab/bench.py is changed in one size at a time, which is doubled or halved. Each
shape is a process of its own. The shapes take turns of some steps. A cost is the time of a step as
a multiple of the unchanged shape's in the same turn: the median over all turns, and its quartiles.
Beside it stands the number of operations that have to be computed, as a multiple as well.
"""
import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import data
from lab import bench
from lab.export import write_model
from model import GPT, GPTConfig
from support import command, flags, machine
from support.files import write_json

BASE = dict(zip(bench.SIZES, bench.SHAPES["small"]))
SIZES = {"pairs": (2, 4, 16, 32), "response": (16, 32, 128, 256), "n_embd": (96, 192, 768)}


def shapes():
    """{name: shape}: the unchanged one, and those in which one size differs."""
    out = {"base": BASE}
    for size, values in SIZES.items():
        for value in values:
            out[f"{size} {value}"] = BASE | {size: value}
    return out


def begin(shape, args, folder):
    """The process that takes the steps of a shape, as bench.start returns it."""
    config = GPTConfig(shape["prompt"] + shape["response"], shape["vocab"], shape["n_layer"],
                       shape["n_head"], shape["n_embd"])
    torch.manual_seed(0)
    write_model(GPT(config), data.get_tokenizer("toy"), folder / "weights")
    task = {"shape": shape, "device": args.device, "dtype": "float32", "threads": args.threads,
            "weights": str(folder / "weights")}
    return bench.start("dpo", {}, task, sys.executable, folder / "work")


def measure(args, folder):
    """{name: the seconds of a step in each turn}"""
    processes, steps, seconds = {}, {}, {name: [] for name in shapes()}
    try:
        for name, shape in shapes().items():
            processes[name] = begin(shape, args, folder / name)
        turns = range(bench.WARM + args.repeats)
        for turn in tqdm(turns, "turns", unit="turn", dynamic_ncols=True):
            for name in sorted(processes, reverse=turn % 2):
                k = steps.get(name, 1)
                took = bench.order(k, *processes[name])["seconds"] / k
                steps[name] = math.ceil(bench.TURN / took)
                if turn >= bench.WARM:
                    seconds[name].append(took)
    finally:
        for _, process in processes.values():
            process.kill()
            process.communicate()
    return seconds


def costs(seconds):
    """{size: a list of its points in order, the unchanged one included}"""
    once = {name: shape["pairs"] * bench.useful_flops(shape, "dpo")
            for name, shape in shapes().items()}
    out = {}
    for size, values in SIZES.items():
        names = {BASE[size]: "base"} | {value: f"{size} {value}" for value in values}
        out[size] = [{
            "size": value, "operations": once[name] / once["base"],
            "seconds": bench.spread(seconds[name])[1],
            "cost": bench.spread([a / b for a, b in zip(seconds[name], seconds["base"])]),
        } for value, name in sorted(names.items())]
    return out


def draw(result, path):
    """A panel for each size: the measured cost, and the number of operations."""
    from support import figures  # only here: it chooses matplotlib's backend
    fig, axes = figures.plt.subplots(1, len(result), figsize=(10.5, 3.9), layout="constrained",
                                     sharey=True, squeeze=False)
    labels = {"pairs": "pairs a step", "response": "tokens a response",
              "n_embd": "channels of the model"}
    for ax, (size, points) in zip(axes[0], result.items()):
        x = [point["size"] for point in points]
        low, middle, high = zip(*(point["cost"] for point in points))
        ax.plot(x, [point["operations"] for point in points], "--", color="black", lw=1.2,
                label="operations that have to be computed")
        ax.errorbar(x, middle, [[b - a for a, b in zip(low, middle)],
                                [b - a for a, b in zip(middle, high)]],
                    fmt="o-", color="#0072B2", capsize=3, label="time of a step, measured")
        for at, value in zip(x, middle):
            ax.annotate(f"{value:.2f}", (at, value), (7, -12), textcoords="offset points",
                        fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 0.5})
        ax.set(xscale="log", yscale="log", xlabel=labels[size])
        ax.set_xticks(x, x)
        ax.minorticks_off()
        ax.margins(x=0.15)
    ticks = [0.125, 0.25, 0.5, 1, 2, 4]
    axes[0, 0].set_yticks(ticks, ticks)
    axes[0, 0].set_ylabel("step, as a multiple of the unchanged shape's")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figures.save(fig, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", metavar="FOLDER", type=flags.writable, default=Path("out/doubling"),
                        help="where the two files are written (default: out/doubling)")
    parser.add_argument("--repeats", type=flags.number(int, 1, 100), default=9,
                        help="turns of each shape (default: 9)")
    parser.add_argument("--threads", type=flags.number(int, 1, 1024),
                        default=torch.get_num_threads(),
                        help="of a process (default: as many as PyTorch takes)")
    parser.add_argument("--device", metavar="{auto,cpu,cuda,mps}", type=machine.device,
                        default="auto")
    args = parser.parse_args(argv)
    args.device = machine.pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        result = costs(measure(args, Path(folder)))
    args.to.mkdir(parents=True, exist_ok=True)
    write_json({"device": args.device, "threads": args.threads, "base": BASE, "costs": result},
               args.to / "doubling.json")
    draw(result, args.to / "doubling.png")
    for size, points in result.items():
        print(f"\n{bench.SIZES[size]:>20}{'seconds a step':>16}{'cost':>8}{'operations':>12}")
        for point in points:
            print(f"{point['size']:>20,}{point['seconds']:>16.3f}{point['cost'][1]:>8.2f}"
                  f"{point['operations']:>12.2f}")
    print(f"\nFigure: {args.to / 'doubling.png'}")


if __name__ == "__main__":
    command.run(main, again="The same command starts again.")
