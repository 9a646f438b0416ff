"""The figures of a run of train.py: curves.png, and on the toy world frontier.png."""
import math
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import world
from support.files import atomic, read_jsonl
from support.run import load_run
from support.show import COLOURS, NAMES
from support.trie import exact_logps

plt.rcParams.update({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#E6E6E6", "legend.frameon": False, "figure.dpi": 150})


def save(fig, path):
    with atomic(path) as beside:
        fig.savefig(beside, bbox_inches="tight")
    plt.close(fig)


def draw_run(folder, summary):
    """Draw the figures of a finished run into its folder, and say where they are."""
    folder = Path(folder)
    flags, _, models = load_run(folder)
    records = read_jsonl(folder / "metrics.jsonl")
    plot_curves(records, folder / "curves.png", summary.get("label_ceiling"))
    names = "curves.png"
    if flags["data"] is None:
        ref_logps = exact_logps(models["sft"], world.prompts()[1])
        plot_frontier(records, ref_logps, summary, folder / "frontier.png")
        names += ", frontier.png"
    print(f"Figures in {folder}: {names}.")


def curve(records, stage, key):
    """(steps, values) of what a stage logged under a name."""
    rows = [r for r in records if r["stage"] == stage and key in r]
    return [r["step"] for r in rows], [r[key] for r in rows]


def plot_curves(records, path, ceiling=None):
    """The training curves of a run's metrics.jsonl records. ceiling: see toy_data.ceiling."""
    logged = {r["stage"] for r in records if "loss" in r}
    stages = [stage for stage in ("dpo", "plain") if stage in logged]
    exact = any("wellformed" in r for r in records)
    fig, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    loss, accuracy, rewards, logps, left, right = axes.flat
    loss.set_title("DPO loss, nats", fontsize=9)
    accuracy.set_title("share of pairs ranked as labelled", fontsize=9)
    rewards.set_title("implicit reward, $\\beta\\,\\log(\\pi/\\pi_{ref})$", fontsize=9)
    logps.set_title("log-probability of a response, nats", fontsize=9)
    for stage in stages:
        look = {"color": COLOURS[stage], "label": NAMES[stage]}
        loss.plot(*curve(records, stage, "loss"), **look)
        accuracy.plot(*curve(records, stage, "rewards/accuracies"), **look)
        for key, style in (("chosen", "-"), ("rejected", ":")):
            look["label"] = f"{NAMES[stage]}, {key}"
            rewards.plot(*curve(records, stage, f"rewards/{key}"), style, **look)
            logps.plot(*curve(records, stage, f"logps/{key}"), style, **look)
    limit = {"color": COLOURS["limit"], "ls": "--"}
    loss.axhline(math.log(2), label="ln 2: policy = reference", **limit)
    if ceiling is not None:
        accuracy.axhline(ceiling, label="ceiling: the annotator's own score", **limit)
    if exact:
        for stage in stages:
            look = {"ms": 3, "color": COLOURS[stage], "label": NAMES[stage]}
            left.plot(*curve(records, stage, "wellformed"), "o-", **look)
            right.plot(*curve(records, stage, "objective_all"), "o-", **look)
        left.set_title("mass on well-formed text (held out, exact)", fontsize=9)
        left.set_ylim(0, 1.03)
        right.set_title("J over all text, at most, units of reward (held out)", fontsize=9)
    else:
        left.plot(*curve(records, "sft", "loss"), color=COLOURS["reference"], label="SFT")
        left.set_title("SFT loss, nats a response", fontsize=9)
        for stage in stages:
            right.plot(*curve(records, stage, "grad_norm"), color=COLOURS[stage],
                       label=NAMES[stage])
        right.set_title("gradient norm before clipping", fontsize=9)
    for ax in (rewards, logps):  # four curves fill the panel, so the legend gets room of its own
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.3 * (high - low))
        ax.legend(fontsize=7, loc="upper right", ncols=len(stages))
    for ax in axes.flat:
        ax.set_xlabel("step")
        if ax not in (rewards, logps) and ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    save(fig, path)


def frontier_to(ref, r, kl):
    """The exact frontier from the reference to a KL: (KL, reward), two lists of 80.

    ref, r (P,N): the reference's log-probabilities, normalised, and the true rewards.
    """
    last = math.log10(world.beta_at_kl(ref, r, kl))
    return world.frontier(ref, r, torch.logspace(2, last, 80).tolist())


def plot_frontier(records, ref_logps, summary, path):
    """The reward-KL plane: frontier, reference, the policies' paths, and pi* at the run's beta."""
    r = world.rewards(world.prompts()[1], world.responses())  # (P, N)
    ref = world.normalise(ref_logps)  # (P, N)
    star = summary["optimal_kl_same_beta"], summary["optimal_reward_same_beta"]
    paths, kls = {}, [star[0]]
    for stage in ("plain", "dpo"):
        paths[stage] = [(e["kl"], e["reward"], e["wellformed"]) for e in records
                        if e["stage"] == stage and "wellformed" in e]
        kls += [x for x, _, _ in paths[stage]]
    kl, reward = frontier_to(ref, r, 1.25 * max(kls))
    green = COLOURS["optimum"]
    fig, ax = plt.subplots(figsize=(6.2, 4.2), layout="constrained")
    ax.plot(kl, reward, color=green, lw=2, label="frontier: no policy is above it (exact)")
    ax.fill_between(kl, reward, max(reward) * 1.08, color=green, alpha=0.08, lw=0)
    for stage, marker in (("plain", "s"), ("dpo", "o")):
        if paths[stage]:
            x, y, w = zip(*paths[stage])
            ax.plot(x, y, marker + "-", ms=4, lw=1, color=COLOURS[stage],
                    label=f"{NAMES[stage]} through training; at the end {w[-1]:.1%} of its text "
                          "is well-formed")
    ax.plot(0, summary["ref_reward"], "D", color=COLOURS["reference"], label="reference (SFT)")
    ax.plot(*star, "*", ms=14, color=green,
            label=f"$\\pi^*$ at $\\beta$ = {summary['beta']:g}, DPO's target")
    ax.set_xlabel("KL(policy || reference), nats a response")
    ax.set_ylabel("true reward E[r*]")
    ax.set_ylim(top=max(reward) * 1.08)
    ax.legend(fontsize=7.5, loc="lower right")
    ax.set_title("Held-out prompts, well-formed text, exact", fontsize=9)
    save(fig, path)
