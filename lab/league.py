"""A league of preference losses. All have the same reference, the same pairs and the same steps.

    python -m lab.league DIR [DIR ...]     DIR: finished toy runs of train.py, one for each seed

A method is tuned on the first run: three settings, and the one with the largest J on the TRAINING
prompts is taken. With that setting it is trained on every run, and measured exactly on the
HELD-OUT prompts. The other conditions take the settings that were chosen in the plain one, and only
about half of the methods.

With three runs and 2 cores, tuning and the plain condition take about 50 minutes. Each of the five
other conditions takes about 15 minutes more. What was trained is kept in DIR/league, and the same
command goes on with what is missing. The table is printed, and a figure goes to DIR/league of the
first run. --record writes the results to docs/league.json, and the figure to docs/league.png.
"""
import argparse
import math
import time
from functools import lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import evaluate
import train
import world
from lab import work
from lab.finished import Finished
from lab.league_methods import CONDITIONS, EVERYWHERE, KINDS, METHODS, SAMPLES, TOLD
from lab.league_training import fit, labelled, looked_up
from lab.seeds import ROOT
from rlhf import RewardModel, Settings, by_model, learn, train_reward_model
from support import checkpoints, command, figures
from support.files import write_json
from support.run import Run
from support.statistics import mean_and_se

# ---- Pieces of work

@lru_cache(maxsize=1)
def train_rewards():
    """The true reward of every response to every training prompt, (P, N): seconds of work."""
    return world.rewards(world.prompts()[0], world.responses())


def on_train_prompts(run, policy):
    """J on the training prompts, by which the settings are chosen."""
    logps = evaluate.exact_logps(policy, run.train_prompts)  # (P, N)
    return evaluate.measure(logps, run.train_ref_logps, run.beta, train_rewards())["objective"]


def measured(run, policy, condition):
    """The columns of the table, exact, on held-out prompts, and J on the training prompts."""
    r, ref = evaluate.held_out_rewards(), world.normalise(run.ref_logps)  # (P, N), (P, N)
    logps = evaluate.exact_logps(policy, run.held_out)  # (P, N)
    row = evaluate.measure(logps, run.ref_logps, run.beta)
    best = world.log_partition(ref, r, run.beta).mean().item() * run.beta  # J of pi*, below Eq. 4
    star = world.optimal_policy(ref, r, run.beta)  # (P, N)
    some = labelled(run, condition)[:1024]
    chosen, ref_chosen = [train.reference_logps(model, some, 512)[0].mean().item()
                          for model in (policy, run.reference)]
    return {"tuned_by": on_train_prompts(run, policy),
            "reward": row["reward"], "kl": row["kl"], "objective": row["objective"],
            "of_optimum": row["objective"] / best,
            "captured": evaluate.captured(row, run.ref_logps)[2],
            "wellformed": row["wellformed"],
            "to_optimum": world.kl(star, world.normalise(logps)).mean().item(),
            "chosen": chosen - ref_chosen}


def reward(run, folder, condition):
    """A piece of work: the reward model of PPO and of REINFORCE++."""
    examples, start = labelled(run, condition), time.process_time()
    model = train_reward_model(run.reference, examples, Run(folder), run.seed)
    checkpoints.save(model.state_dict(), folder / "reward.pt")
    return {"seconds": time.process_time() - start}


def train_one(run, folder, method, condition, **settings):
    """A piece of work: one method, with one setting, on one run."""
    loss, stopped = METHODS[method].loss, None
    labelled(run, condition)  # before the clock starts: all methods share it
    before = 0.0  # the seconds of what was done once for several methods
    if loss is not None and not settings.get("rounds"):
        before = looked_up(run, condition, settings.get("stray_weight", 0) > 0)[2]
    start = time.process_time()
    if loss is None:
        policy, name = run.new_policy(), f"league/{condition}/reward"
        model = RewardModel(run.reference)
        model.load_state_dict(checkpoints.load(run.folder / name / "reward.pt"))
        judge = by_model(model.requires_grad_(False).eval())
        try:
            learn(policy, run.reference, judge, run.prompt_ids,
                  Settings(beta=run.beta, **settings), run.seed, name=method)
        except RuntimeError as error:  # torch draws no token from probabilities that are nan
            if "probability tensor" not in str(error):
                raise
            stopped = f"policy learning: {error}"
        before = work.result(run.folder, name)["seconds"]
    else:
        policy, stopped = fit(run, folder, loss, condition, **settings)
    seconds = time.process_time() - start + before
    if stopped:
        return {"stopped": stopped, "seconds": seconds}
    return measured(run, policy, condition) | {"seconds": seconds}


def piece(method, condition, settings):
    name = "_".join([method, *(f"{key}-{value:g}" for key, value in settings.items())])
    needs = ()
    if METHODS[method].loss is None:
        settings = {"samples": SAMPLES} | settings
        needs = (f"league/{condition}/reward",)
    settings = {"method": method, "condition": condition} | settings
    return work.Piece(f"league/{condition}/{name}", train_one, settings, needs)


def with_rewards(pieces):
    """These pieces, and before them the reward models that they need."""
    names = dict.fromkeys(name for one in pieces for name in one.needs)
    return [work.Piece(name, reward, {"condition": name.split("/")[1]}) for name in names] + pieces


# ---- The league

def tune(folder):
    """{method: [(settings, J on the training prompts), ...]} of the first run. J is None where the
    training was stopped."""
    return {name: [(settings, work.result(folder, piece(name, "plain", settings).name)
                    .get("tuned_by")) for settings in method.grid]
            for name, method in METHODS.items()}


def choose(tuned):
    """{method: its settings}: those with the largest J on the training prompts."""
    def worth(entry):
        return -math.inf if entry[1] is None or math.isnan(entry[1]) else entry[1]
    return {method: max(entries, key=worth)[0] for method, entries in tuned.items()}


def final(chosen, condition):
    """{method: its piece} in a condition. Some methods are told what they are made for."""
    told = TOLD.get(condition, {})
    return {method: piece(method, condition, settings | told.get(method, {}))
            for method, settings in chosen.items() if condition == "plain" or method in EVERYWHERE}


def frontier(runs):
    """The exact frontier and pi*, means over the runs at the same betas, as over prompts."""
    r, betas = evaluate.held_out_rewards(), torch.logspace(2, -1.5, 80).tolist()
    refs = [world.normalise(run.ref_logps) for run in runs]  # (P, N) each

    def mean(betas):
        points = [world.frontier(ref, r, betas) for ref in refs]
        return torch.tensor(points, dtype=torch.float64).mean(0).tolist()  # KLs, rewards
    kl, reward = mean(betas)
    [star_kl], [star_reward] = mean([runs[0].beta])
    return {"kl": kl, "reward": reward, "optimum": {"kl": star_kl, "reward": star_reward}}


def over_runs(rows, column):
    """Mean and standard error of a column, over the runs where the training came to its end."""
    return mean_and_se([row[column] for row in rows if column in row])


def ended(league, condition):
    """The methods that came to their end on some run, the largest J/J* first."""
    results = league["results"][condition]
    names = [name for name, rows in results.items() if any("kl" in row for row in rows)]
    return sorted(names, key=lambda name: -over_runs(results[name], "of_optimum")[0])


def table(league, condition):
    """The results of a condition as text, a line for each method."""
    def cell(rows, column, digits, scale=1):
        mean, error = over_runs(rows, column)
        error = "" if math.isnan(error) else f" ± {scale * error:.{digits}f}"
        return f"{scale * mean:.{digits}f}{error}"

    results, seeds = league["results"][condition], league["seeds"]
    columns = {"of_optimum": ("J/J*, %", 1, 100), "captured": ("share, %", 1, 100),
               "reward": ("reward", 3, 1), "kl": ("KL", 3, 1), "wellformed": ("well-f., %", 1, 100),
               "to_optimum": ("KL(pi*||pi)", 3, 1), "chosen": ("chosen", 2, 1),
               "seconds": ("seconds", 0, 1)}
    lines = [f"{condition}: {CONDITIONS[condition]}. Runs: {len(seeds)}.", "",
             f"{'held-out prompts':<19}" + "".join(f"{title:>16}" for title, *_ in columns.values())
             + "  settings"]
    order = ended(league, condition)
    for name in order + [name for name in results if name not in order]:
        rows = results[name]
        line = f"{METHODS[name].title:<19}"
        if name in order:
            cells = [cell(rows, key, *how) for key, (_, *how) in columns.items()]
            line += "".join(f"{text:>16}" for text in cells)
        settings = league["settings"][name] | TOLD.get(condition, {}).get(name, {})
        line += "  " + ", ".join(f"{key} {value:g}" for key, value in settings.items())
        stopped = [row["stopped"] for row in rows if "stopped" in row]
        if stopped:
            line += f"  STOPPED on {len(stopped)} of {len(rows)} runs: {stopped[0]}"
        lines.append(line)
    return "\n".join(lines) + """

share: of the gain in reward that is possible at the policy's own KL. reward, KL (nats), J, share
and KL(pi*||pi) are over well-formed text. well-f.: the mass on it. chosen: how much the mean
log-probability of a chosen response has changed. seconds: of one core, for one training."""


# ---- The figure

LOOK = {"difference": ("o", "#0072B2"), "added": ("^", "#009E73"), "levels": ("s", "#E69F00"),
        "alone": ("v", "#CC79A7"), "samples": ("P", "#000000")}


def write_names(ax, points, gap=0.05):
    """Names beside the axes, with a line to each point. points: [(KL, reward, name, colour)].
    The half with the smaller KL has its names on the left. A name is at its point's height where
    there is room, and the others are at least `gap` of the axes' height apart."""
    points, (bottom, top) = sorted(points), ax.get_ylim()
    for x, align, some in ((-0.12, "right", points[:len(points) // 2]),
                           (1.03, "left", points[len(points) // 2:])):
        some = sorted(some, key=lambda point: -point[1])  # from top to bottom
        heights = [(reward - bottom) / (top - bottom) for _, reward, *_ in some]
        for i in range(1, len(some)):
            heights[i] = min(heights[i], heights[i - 1] - gap)
        for i in reversed(range(len(some))):  # up again, what came to stand too low
            least = heights[i + 1] + gap if i + 1 < len(some) else 0.0
            heights[i] = max(heights[i], least)
        for (kl, reward, name, colour), height in zip(some, heights):
            ax.annotate(name, (kl, reward), (x, height), textcoords="axes fraction", ha=align,
                        va="center", fontsize=8, annotation_clip=False,
                        arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6})


def draw(league, condition, path):
    """The methods on the reward-KL plane, under the exact frontier: all, and those near pi*. A
    marker is hollow where less than 90% of the mass is well-formed."""
    results, line = league["results"][condition], league["frontier"]
    star, green, points = line["optimum"], figures.COLOURS["optimum"], []
    for name in ended(league, condition):
        kl, reward, mass = [over_runs(results[name], column)[0]
                            for column in ("kl", "reward", "wellformed")]
        points.append((kl, reward, METHODS[name].title, *LOOK[METHODS[name].kind], mass))
    low, high = 0.55 * star["kl"], 1.5 * star["kl"]
    bottom, top = 0.75 * star["reward"], 1.12 * star["reward"]
    inside = [low < kl < high and bottom < reward < top for kl, reward, *_ in points]
    farthest = max([star["kl"]] + [kl for kl, *_ in points])
    fig, axes = plt.subplots(1, 2, figsize=(15, 6.4), layout="constrained")
    for ax in axes:
        ax.plot(line["kl"], line["reward"], color=green, lw=2)
        ax.plot(star["kl"], star["reward"], "*", ms=15, color=green, mec="white", zorder=2)
        for kl, reward, _, marker, colour, mass in points:
            ax.plot(kl, reward, marker, ms=6.5, color=colour, zorder=3,
                    mfc=colour if mass >= 0.9 else "white")
        ax.set_xlabel("KL(policy || reference), nats a response")
        if ax is axes[0]:
            ax.set_xlim(-0.03 * farthest, 1.1 * farthest)
        else:
            ax.set(xlim=(low, high), ylim=(bottom, top))
        write_names(ax, [(kl, reward, name, colour) for (kl, reward, name, _, colour, _), near
                         in zip(points, inside) if near == (ax is axes[1])])
    axes[0].set_ylabel("true reward E[r*]")
    axes[0].add_patch(plt.Rectangle((low, bottom), high - low, top - bottom, fill=False,
                                    color="#666666", lw=0.8, ls=":"))
    axes[0].set_title(f"{condition}; held-out prompts, well-formed text, exact", fontsize=9)
    axes[1].set_title("the dotted part, larger", fontsize=9)
    handles = [plt.Line2D([], [], marker=marker, color=colour, ls="", label=KINDS[kind])
               for kind, (marker, colour) in LOOK.items()]
    handles += [plt.Line2D([], [], marker="o", color="#666666", mfc="white", ls="",
                           label="less than 90% well-formed"),
                plt.Line2D([], [], color=green, marker="*", label="frontier, and the optimum")]
    fig.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5)
    figures.save(fig, path)


# ---- The command

def main(argv=None):
    listed = "; ".join(f"{name}: {what}" for name, what in CONDITIONS.items())
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", metavar="DIR", type=Path, nargs="+",
                        help="finished toy runs of train.py, one for each seed")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=["plain"],
                        metavar="CONDITION",
                        help=f"one or several of: {listed.replace('%', '%%')} (default: plain)")
    parser.add_argument("--record", action="store_true",
                        help="write docs/league.json, which a page quotes, and docs/league.png")
    args = parser.parse_args(argv)
    runs = [Finished(folder) for folder in args.dirs]
    flags = [run.flags | {"seed": None} for run in runs]
    if len({run.seed for run in runs}) < len(runs) or any(f != flags[0] for f in flags):
        raise SystemExit("the runs must differ in their seeds, and in nothing else")
    if runs[0].beta != 1:
        raise SystemExit(f"{args.dirs[0]} has beta = {runs[0].beta:g}: the settings of the league "
                         "are made for beta = 1")

    grid = [piece(m, "plain", settings) for m in METHODS for settings in METHODS[m].grid]
    work.do(with_rewards(grid), args.dirs[:1])
    tuned = tune(args.dirs[0])
    chosen = choose(tuned)
    pieces = {condition: final(chosen, condition) for condition in args.conditions}
    work.do(with_rewards([one for row in pieces.values() for one in row.values()]), args.dirs)

    results = {condition: {method: [work.result(folder, one.name) for folder in args.dirs]
                           for method, one in row.items()} for condition, row in pieces.items()}
    league = {"seeds": [run.seed for run in runs], "settings": chosen, "tuned": tuned,
              "frontier": frontier(runs), "results": results}
    folder = args.dirs[0] / "league"
    write_json(league, folder / "league.json")
    for condition in args.conditions:
        print("\n" + table(league, condition))
        draw(league, condition, folder / f"{condition}.png")
        print(f"\nFigure: {folder / condition}.png")
    if args.record:
        write_json(league, ROOT / "docs" / "league.json")
        draw(league, args.conditions[0], ROOT / "docs" / "league.png")


if __name__ == "__main__":
    command.run(main, again="The same command goes on with what is missing.")
