"""The paper's experiments in miniature, on a world where the best answer is known.

    python experiments.py all             everything: trains what is missing, then draws (about 40 minutes on 2 cores)
    python experiments.py fig2-left       one of them; `python experiments.py --help` lists them

Three seeds each, means +- standard errors over them. Every figure is exact, on held-out prompts, unless it says otherwise.
Results: docs/paper/NAME.csv, a row a seed and setting, and docs/paper/NAME.png. What was trained is kept in out/paper and not
trained again.

The figure and table numbers are those of the DPO paper, https://arxiv.org/abs/2305.18290v3. Its settings (beta 0.1 and 0.5,
RMSprop, learning rate 1e-6) are for models a hundred thousand times larger; here they are chosen anew.
"""
import argparse
import concurrent.futures
import csv
import json
import math
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

import data
import evaluate
import rlhf
import tabular
import world

ROOT = Path(__file__).resolve().parent
WORK, RESULTS = ROOT / "out" / "paper", ROOT / "docs" / "paper"
SEEDS = (0, 1, 2)
SWEEP = 20_480               # responses generated in each policy learning of a sweep; half of rlhf.py's default


# --------------------------------------------------------------------------------------------------------------------
# What is trained: cells. A cell is a function of a run and settings that returns plain numbers; each is computed once.

def cell_dpo(run, folder, beta=1.0, labels=None):
    return run.measure(rlhf.dpo_policy(run, run.examples("human")[:labels], folder, beta))


def cell_ppo(run, folder, judge="human", path=False, labels=None, **settings):
    """Policy learning; path: measured on the way, with a sample. labels: fit a reward model to so many pairs first."""
    if labels:
        reward_model = rlhf.train_reward_model(run.reference, run.examples("human")[:labels], folder, run.seed)
    elif judge == "human":
        reward_model = run.reward_model("reward-human")
    score = rlhf.by_text(world.true_reward) if judge == "true" else rlhf.by_model(reward_model)
    policy, steps = run.new_policy(), []
    settings = {"samples": SWEEP, "beta": run.beta} | settings
    every = max(1, settings["samples"] // 512 // 10) * 512

    def at_step(generated):
        if path and generated % every == 0:
            with torch.random.fork_rng():                              # policy learning draws what it would have drawn
                prompt = run.tokenizer.encode_ordinary(run.held_out[0])
                ids = policy.generate([prompt], rlhf.MAX_NEW_TOKENS, eos_id=run.tokenizer.eot_token)[0]
            steps.append({"generated": generated, **run.measure(policy), "sample": run.tokenizer.decode(ids).removesuffix("<|endoftext|>")})
    history = rlhf.learn(policy, run.reference, score, run.prompt_ids, rlhf.Settings(**settings), run.seed, at_step)
    for step in steps[1:]:
        step["score"] = next(h["score"] for h in history if h["generated"] == step["generated"])
    return run.measure(policy) | {"path": steps}


def cell_unlikelihood(run, folder, alpha):
    return run.measure(rlhf.unlikelihood(run.new_policy(), run.examples("human"), folder, run.seed, alpha))


def two_samplers(prompts):
    """Who writes the pairs of fig3: a keen writer, the grammar tilted towards reward, and one who takes any review alike."""
    grammar = world.grammar_logps(prompts)
    keen = world.optimal_policy(grammar, world.rewards(prompts, world.responses()), 2.0)
    return keen, torch.full_like(grammar, -math.log(grammar.size(1)))


def cell_fig3(run, folder):
    """Pairs from two other samplers; the reference is Preferred-FT on them, as the paper has it where no SFT model fits."""
    texts, g = world.responses(), torch.Generator().manual_seed(run.seed)
    prompt = torch.arange(run.flags["pairs"]) % len(run.train_prompts)
    keen, any_ = (data._draw(s, prompt, g) for s in two_samplers(run.train_prompts))
    rewards = world.rewards(run.train_prompts, texts)
    p_keen = world.preference_prob(rewards[prompt, keen], rewards[prompt, any_])
    keen_wins = torch.rand(len(prompt), generator=g, dtype=torch.float64) < p_keen
    pairs = [data.Pair(run.train_prompts[x], texts[a if w else b], texts[b if w else a])
             for x, a, b, w in zip(prompt.tolist(), keen.tolist(), any_.tolist(), keen_wins.tolist()) if a != b]
    examples = data.tokenize(pairs, run.tokenizer)[0]

    # the distribution of the data's chosen responses to held-out prompts, exact
    r, (keen, any_) = evaluate.held_out_rewards(), two_samplers(run.held_out)
    p = torch.stack([tabular.preferences(row) for row in r])                                          # (P, N, N)
    chosen = (keen.exp() * (p @ any_.exp()[:, :, None])[:, :, 0] + any_.exp() * (p @ keen.exp()[:, :, None])[:, :, 0]).log()
    chosen_all, r_all = world.with_ill_formed(world.normalise(chosen), r)

    def win(logps):
        return world.win_rate(world.with_ill_formed(logps, r)[0], chosen_all, r_all).mean().item()
    wins = lambda policy: win(evaluate.exact_logps(policy, run.held_out))
    out = {"base": wins(run.reference)}
    reference = rlhf.preferred_ft(run.new_policy(), examples, folder, run.seed).requires_grad_(False)
    out["Preferred-FT"] = wins(reference)
    ref = world.normalise(evaluate.exact_logps(reference, run.held_out))
    out["best of 128 by r*"] = win(torch.stack([tabular.best_of_n(q, s, 128) for q, s in zip(ref, r)]))
    steps = []

    def at_step(policy, step, total):
        if step in {round(total * share / 10) for share in range(11)}:
            steps.append({"step": step, "win": wins(policy)})
    # missing_mass is for pairs that the reference wrote; here a likelihood term holds the text together
    policy = rlhf.dpo_policy(run, examples, folder, run.beta, reference=reference, at_step=at_step, norm_weight=0.0, nll_weight=0.05)
    out["DPO"] = wins(policy)
    return out | {"path": steps, "wellformed": evaluate.exact_logps(policy, run.held_out).exp().sum(-1).mean().item()}


class Tempered(torch.nn.Module):
    """A GPT that samples at a temperature: its logits divided by it; 0 is greedy."""

    def __init__(self, gpt, temperature):
        super().__init__()
        self.gpt, self.scale = gpt, 1 / max(temperature, 1e-6)
        self.new_cache = gpt.new_cache

    def forward(self, tokens, cache=None):
        return self.gpt(tokens, cache) * self.scale


TEMPERATURES = (0, 0.25, 0.5, 0.75, 1)
NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BASE_POLICIES = {"reference": "reference", "Preferred-FT": "preferred-ft", "PPO, learned reward": "ppo-human", "DPO": "dpo"}


def base_policy(run, name):
    return run.reference if name == "reference" else run.models["dpo"] if name == "dpo" else run.policy(name)


def cell_temperatures(run, folder):
    """Win rate against the reference's own samples (temperature 1), by the policy's temperature."""
    r = evaluate.held_out_rewards()
    ref_all, r_all = world.with_ill_formed(evaluate.exact_logps(run.reference, run.held_out), r)
    out = {}
    for title, name in BASE_POLICIES.items():
        for t in TEMPERATURES:
            logps = evaluate.exact_logps(Tempered(base_policy(run, name), t), run.held_out)
            out[f"{title}|{t}"] = world.win_rate(world.with_ill_formed(logps, r)[0], ref_all, r_all).mean().item()
    return out


def cell_generalisation(run, folder):
    """The same policies on prompts that were trained on and on combinations that never were."""
    out = {}
    for where, prompts in (("trained", run.train_prompts), ("held out", run.held_out)):
        r, ref = world.rewards(prompts, world.responses()), evaluate.exact_logps(run.reference, prompts)
        best = tabular.objective(world.optimal_policy(world.normalise(ref), r, run.beta), world.normalise(ref), r, run.beta).mean().item()
        for title, name in BASE_POLICIES.items():
            row = evaluate.measure(evaluate.exact_logps(base_policy(run, name), prompts), ref, run.beta, r)
            out[f"{title}|{where}"] = row | {"objective_optimal": best}
    return out


def cell_best_of_n(run, folder):
    """Best of N samples of the reference's well-formed text, ranked by the learned reward and by r*. Exact for every N."""
    r, ref = evaluate.held_out_rewards(), world.normalise(evaluate.exact_logps(run.reference, run.held_out))
    learned, out = rlhf.all_scores(run.reward_model("reward-human"), run.held_out), {}
    for judge, scores in (("learned reward", learned), ("r*", r)):
        for n in NS:
            best = torch.stack([tabular.best_of_n(q, s, n) for q, s in zip(ref, scores)])
            out[f"{judge}|{n}"] = {"win_rate": world.win_rate(best, ref, r).mean().item(), "kl": world.kl(best, ref).mean().item(),
                                   "reward": world.expected(best, r).mean().item()}
    return out


def cell_pushed(run, folder):
    """The reference tilted by the learned reward, harder and harder: what a perfect optimiser of it would reach. Exact."""
    r, ref = evaluate.held_out_rewards(), world.normalise(evaluate.exact_logps(run.reference, run.held_out))
    learned, out = rlhf.all_scores(run.reward_model("reward-human"), run.held_out), {}
    for k in range(41):
        beta = 10 ** (1 - k / 16)
        tilted = world.optimal_policy(ref, learned, beta)
        out[f"{beta:.6g}"] = {"kl": world.kl(tilted, ref).mean().item(), "reward": world.expected(tilted, r).mean().item(),
                              "learned": world.expected(tilted, learned).mean().item()}
    return out


def cell_frontier(run, folder):
    r, ref = evaluate.held_out_rewards(), world.normalise(evaluate.exact_logps(run.reference, run.held_out))
    betas = [10 ** (2 - k / 20) for k in range(71)]
    kl, reward = world.frontier(ref, r, betas)
    return {"kl": kl, "reward": reward}


DETAILS = {"as it is": {}, "lambda = 0.95": {"lam": 0.95}, "no advantage normalisation": {"normalise_advantages": False},
           "no ratio clip": {"clip": None}, "value clip 0.2": {"clip_values": 0.2}, "reward scaling": {"scale_rewards": True},
           "no learning rate annealing": {"anneal_lr": False}, "no gradient clipping": {"max_grad_norm": None},
           "no critic: REINFORCE++": {"critic": False}}
BETAS, TARGETS, ALPHAS = (0.25, 0.5, 2.0, 4.0), (0.3, 0.6, 1.5, 2.5), (0.05, 0.3, 0.6)
LABELS, BUDGETS = (2_500, 5_000, 10_000, 20_000), (2_560, 5_120, 10_240, 20_480, 40_960)

# name: (function, settings). What several experiments need is trained once.
CELLS = {"frontier": (cell_frontier, {}), "temperatures": (cell_temperatures, {}), "generalisation": (cell_generalisation, {}),
         "best-of-n": (cell_best_of_n, {}), "pushed": (cell_pushed, {}), "fig3": (cell_fig3, {}),
         "ppo-unleashed": (cell_ppo, {"beta": 0.05, "path": True}),
         **{f"dpo-beta-{b:g}": (cell_dpo, {"beta": b}) for b in BETAS},
         **{f"unlikelihood-{a:g}": (cell_unlikelihood, {"alpha": a}) for a in ALPHAS},
         **{f"ppo-{judge}-kl-{k:g}": (cell_ppo, {"judge": judge, "target_kl": k}) for judge in ("human", "true") for k in TARGETS},
         **{f"dpo-labels-{n}": (cell_dpo, {"labels": n}) for n in LABELS},
         **{f"ppo-labels-{n}": (cell_ppo, {"labels": n}) for n in LABELS},
         **{f"ppo-samples-{n}": (cell_ppo, {"samples": n}) for n in BUDGETS[:-1]},
         **{f"details-{i}": (cell_ppo, {"judge": "true", **settings}) for i, settings in enumerate(DETAILS.values())}}

EXPERIMENTS = {         # name: (what it is, the cells it needs)
    "fig2-left": ("reward against KL: DPO, PPO, Preferred-FT, Unlikelihood, best-of-N under the exact frontier",
                  ["frontier", "best-of-n",
                   *(c for c in CELLS if c.startswith(("dpo-beta", "unlikelihood", "ppo-human-kl", "ppo-true-kl")))]),
    "fig2-right": ("win rate against sampling temperature", ["temperatures"]),
    "fig3": ("pairs by two other samplers, Preferred-FT as the reference: win rate against the data's chosen responses", ["fig3"]),
    "table1": ("prompts trained on, and combinations never seen", ["generalisation"]),
    "fig4": ("best of N by the learned reward and by r*, beside the bounds", ["best-of-n"]),
    "labels-and-samples": ("two kinds of efficiency: labels, and generated samples",
                           [c for c in CELLS if "-labels-" in c or c.startswith("ppo-samples")]),
    "over-optimisation": ("true reward as the learned reward is pushed", ["frontier", "pushed", "ppo-unleashed"]),
    "ppo-details": ("PPO with and without the details that are said to matter", [c for c in CELLS if c.startswith("details")]),
    "who-labels": ("RLHF, RLAIF, d-RLAIF and DPO in one table", []),
}


# --------------------------------------------------------------------------------------------------------------------
# Training what is missing

def base(seed):
    return WORK / f"seed-{seed}"


def make_bases():
    """A default run of train.py and of rlhf.py for every seed."""
    for seed in SEEDS:
        for command, result in (("train.py --seed {0} --out-dir {1}", "summary.json"), ("rlhf.py {1}", "rlhf.json")):
            if not (base(seed) / result).exists():
                words = [word.format(seed, base(seed)) for word in command.split()]
                resume = ["--resume"] if words[0] == "train.py" and base(seed).exists() else []
                print("$ python " + " ".join([*words[:-1], str(Path(words[-1]).relative_to(ROOT))]), flush=True)
                subprocess.run([sys.executable, *words, *resume], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def cell_file(seed, name):
    return base(seed) / "cells" / f"{name}.json"


@lru_cache
def run_of(folder):
    """A folder's Run, loaded once in every process: the reference's exact log-probabilities, once added up, it keeps."""
    return rlhf.Run(folder)


def make_cell(seed, name):
    torch.set_num_threads(1)
    function, settings = CELLS[name]
    folder = base(seed) / "cells" / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    evaluate.write_json({"settings": settings, "result": function(run_of(base(seed)), folder, **settings)}, cell_file(seed, name))


def make_cells(names):
    missing = [(seed, name) for name in names for seed in SEEDS if not cell_file(seed, name).exists()]
    if not missing:
        return
    with rlhf.processes() as pool:
        jobs = [pool.submit(make_cell, *cell) for cell in missing]
        done = concurrent.futures.as_completed(jobs)
        for job in tqdm(done, total=len(jobs), desc="cells", unit="cell", dynamic_ncols=True, disable=False):
            job.result()


def cell(seed, name):
    return json.loads(cell_file(seed, name).read_text(encoding="utf-8"))["result"]


def rlhf_rows(seed):
    return json.loads((base(seed) / "rlhf.json").read_text(encoding="utf-8"))["rows"]


# --------------------------------------------------------------------------------------------------------------------
# Drawing. Each function returns the rows of its CSV and leaves the figure in `fig`.

C = {"DPO": "#0072B2", "PPO, learned reward": "#E69F00", "PPO, true reward": "#009E73", "Preferred-FT": "#CC79A7",
     "Unlikelihood": "#D55E00", "reference": "#000000", "best of N, learned reward": "#999999", "RLHF": "#E69F00",
     "base": "#000000", "best of 128 by r*": "#999999"}
M = {"DPO": "o", "PPO, learned reward": "s", "PPO, true reward": "P", "Preferred-FT": "v", "Unlikelihood": "X", "reference": "D",
     "best of N, learned reward": "<", "RLHF": "s", "base": "D", "best of 128 by r*": "<"}


def mean_se(values):
    """Mean and standard error over seeds."""
    v = torch.tensor(values, dtype=torch.float64)
    return v.mean().item(), v.std().item() / math.sqrt(len(v))


def points(ax, rows, x, y, name, key="setting", **style):
    """Means over seeds with standard errors both ways; rows: dicts with seed and key. A line through the settings in order."""
    settings = list(dict.fromkeys(r[key] for r in rows))
    (mx, sx), (my, sy) = (zip(*(mean_se([r[c] for r in rows if r[key] == s]) for s in settings)) for c in (x, y))
    ax.errorbar(mx, my, xerr=sx, yerr=sy, marker=M.get(name, "o"), ms=5, lw=1, capsize=2, color=C.get(name), label=name, **style)


def draw_fig2_left(plt):
    keep = lambda row: {k: row[k] for k in ("reward", "kl", "wellformed", "objective", "objective_all")}
    rows = []
    for seed in SEEDS:
        row = lambda method, setting, values: rows.append({"seed": seed, "method": method, "setting": setting, **keep(values)})
        done = rlhf_rows(seed)
        row("reference", "", done["reference"])
        for beta in sorted((1.0, *BETAS), reverse=True):
            row("DPO", f"beta {beta:g}", done["dpo"] if beta == 1 else cell(seed, f"dpo-beta-{beta:g}"))
        for method, judge in (("PPO, learned reward", "human"), ("PPO, true reward", "true")):
            for k in TARGETS:
                row(method, f"target KL {k:g}", cell(seed, f"ppo-{judge}-kl-{k:g}"))
        row("Preferred-FT", "", done["preferred-ft"])
        for alpha in sorted((0.1, *ALPHAS)):
            row("Unlikelihood", f"alpha {alpha:g}", done["unlikelihood"] if alpha == 0.1 else cell(seed, f"unlikelihood-{alpha:g}"))
        for n in NS[1:]:
            b = cell(seed, "best-of-n")[f"learned reward|{n}"]
            rows.append({"seed": seed, "method": "best of N, learned reward", "setting": f"N {n}", "reward": b["reward"],
                         "kl": b["kl"], "wellformed": 1.0})
        f = cell(seed, "frontier")
        for r in rows:                                     # how far under the frontier, at its own KL
            if r["seed"] == seed and r["kl"] > 1e-9:
                r["share_of_frontier"] = share_of_frontier(f, r)
    fig, (ax, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained", width_ratios=[1.5, 1])
    f = [cell(seed, "frontier") for seed in SEEDS]
    mean = lambda key: torch.tensor([g[key] for g in f]).mean(0)
    ax.plot(mean("kl"), mean("reward"), color=evaluate.COLOURS["optimum"], lw=2, label="frontier (exact)")
    for method in dict.fromkeys(r["method"] for r in rows):
        points(ax, [r for r in rows if r["method"] == method], "kl", "reward", method)
        if not method.startswith("best"):
            points(right, [r for r in rows if r["method"] == method], "kl", "wellformed", method)
    ax.set_xlim(-0.1, 4.8)
    ax.set_xlabel("KL(policy || reference), nats a response")
    right.set_xlabel("KL(policy || reference), nats a response")
    ax.set_ylabel("true reward E[r*]")
    ax.legend(fontsize=7, loc="lower right")
    ax.set_title("over well-formed text", fontsize=9)
    right.set_ylabel("share of the policy's text that is well-formed")
    right.set_title("and how much of its text that is", fontsize=9)
    right.set_ylim(0, 1.03)
    right.set_xlim(-0.1, 4.8)
    return rows, fig


def share_of_frontier(frontier, row):
    """The row's gain over the reference as a share of the frontier's gain at the row's KL, interpolated."""
    kl, reward = frontier["kl"], frontier["reward"]
    i = next((i for i, k in enumerate(kl) if k >= row["kl"]), len(kl) - 1)
    if i == 0:
        return math.nan
    t = (row["kl"] - kl[i - 1]) / (kl[i] - kl[i - 1])
    best = reward[i - 1] + min(1.0, t) * (reward[i] - reward[i - 1])
    return (row["reward"] - reward[0]) / (best - reward[0])


def draw_fig2_right(plt):
    rows = [{"seed": seed, "method": name, "temperature": t, "win_rate": cell(seed, "temperatures")[f"{name}|{t}"]}
            for seed in SEEDS for name in BASE_POLICIES for t in TEMPERATURES]
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in BASE_POLICIES:
        points(ax, [r for r in rows if r["method"] == name], "temperature", "win_rate", name, key="temperature")
    ax.axhline(0.5, color=evaluate.COLOURS["limit"], ls="--", lw=1)
    ax.set_xlabel("sampling temperature of the policy")
    ax.set_ylabel("win rate against the reference's samples")
    ax.set_ylim(0, 1.02)
    ax.legend(fontsize=8)
    return rows, fig


def draw_fig3(plt):
    rows, fig = [], plt.figure(figsize=(9, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.4])
    names = ("base", "Preferred-FT", "best of 128 by r*", "DPO")
    for seed in SEEDS:
        c = cell(seed, "fig3")
        rows += [{"seed": seed, "method": name, "step": "", "win_rate": c[name]} for name in names]
        rows += [{"seed": seed, "method": "DPO", "step": p["step"], "win_rate": p["win"]} for p in c["path"]]
    for i, name in enumerate(names):
        m, s = mean_se([r["win_rate"] for r in rows if r["method"] == name and r["step"] == ""])
        left.bar(i, m, yerr=s, color=C[name], capsize=3)
        left.text(i, m + 0.03, f"{m:.0%}", ha="center", fontsize=8)
    left.set_xticks(range(len(names)), [n.replace(" by", "\nby") for n in names], fontsize=8)
    left.axhline(0.5, color=evaluate.COLOURS["limit"], ls="--", lw=1)
    left.set_ylabel("win rate against the data's chosen responses")
    left.set_ylim(0, 1)
    points(right, [r for r in rows if r["step"] != ""], "step", "win_rate", "DPO", key="step")
    right.axhline(0.5, color=evaluate.COLOURS["limit"], ls="--", lw=1, label="as good as the chosen responses")
    right.set_xlabel("DPO step")
    right.set_ylabel("win rate against the data's chosen responses")
    right.set_ylim(0, 1)
    right.legend(fontsize=8, loc="lower right")
    return rows, fig


def draw_table1(plt):
    rows = [{"seed": seed, "method": name, "prompts": where, **cell(seed, "generalisation")[f"{name}|{where}"]}
            for seed in SEEDS for name in BASE_POLICIES for where in ("trained", "held out")]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for ax, column, label in ((left, lambda r: r["win_rate"], "win rate against the reference"),
                              (right, lambda r: r["objective"] / r["objective_optimal"], "J as a share of the optimum's")):
        names = [n for n in BASE_POLICIES if n != "reference"]
        for i, name in enumerate(names):
            for k, where in enumerate(("trained", "held out")):
                m, s = mean_se([column(r) for r in rows if r["method"] == name and r["prompts"] == where])
                ax.bar(i + 0.38 * (k - 0.5), m, 0.36, yerr=s, color=C[name], alpha=1 if k == 0 else 0.55, capsize=3,
                       hatch="" if k == 0 else "//", label=f"prompts {where}" if i == 0 else None)
                ax.text(i + 0.38 * (k - 0.5), m + 0.02, f"{m:.1%}", ha="center", fontsize=7)
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set_ylabel(label)
        ax.set_ylim(0, 1.12)
    left.legend(fontsize=8, loc="upper left")
    return rows, fig


def draw_fig4(plt):
    rows = [{"seed": seed, "judge": judge, "N": n, **cell(seed, "best-of-n")[f"{judge}|{n}"]}
            for seed in SEEDS for judge in ("learned reward", "r*") for n in NS]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for judge, colour, marker in (("learned reward", C["PPO, learned reward"], "s"), ("r*", C["PPO, true reward"], "o")):
        of = lambda key: zip(*(mean_se([r[key] for r in rows if r["judge"] == judge and r["N"] == n]) for n in NS))
        for ax, key in ((left, "win_rate"), (right, "kl")):
            m, s = of(key)
            ax.errorbar(NS, m, yerr=s, marker=marker, ms=5, lw=1, capsize=2, color=colour, label=f"ranked by {judge} (exact)")
    left.plot(NS, [n / (n + 1) for n in NS], "--", color=evaluate.COLOURS["limit"], label="bound N/(N+1)")
    right.plot(NS, [math.log(n) - (n - 1) / n for n in NS], "--", color=evaluate.COLOURS["limit"], label="bound log N - (N-1)/N")
    for ax, label in ((left, "win rate against one sample"), (right, "KL(best of N || reference), nats")):
        ax.set_xscale("log", base=2)
        ax.set_xticks(NS, [str(n) for n in NS])
        ax.set_xlabel("N, samples drawn for every answer")
        ax.set_ylabel(label)
        ax.legend(fontsize=8)
    return rows, fig


def draw_labels_and_samples(plt):
    rows = []
    for seed in SEEDS:
        done = rlhf_rows(seed)
        for n in (*LABELS, 40_000):
            for method, values in (("DPO", done["dpo"] if n == 40_000 else cell(seed, f"dpo-labels-{n}")),
                                   ("RLHF", cell(seed, "ppo-samples-20480") if n == 40_000 else cell(seed, f"ppo-labels-{n}"))):
                rows.append({"seed": seed, "method": method, "labels": n, "generated": 0 if method == "DPO" else SWEEP,
                             **{k: values[k] for k in ("reward", "kl", "objective", "wellformed")}})
        for n in BUDGETS:
            values = done["ppo-human"] if n == BUDGETS[-1] else cell(seed, f"ppo-samples-{n}")
            rows.append({"seed": seed, "method": "RLHF, 40,000 labels", "labels": 40_000, "generated": n,
                         **{k: values[k] for k in ("reward", "kl", "objective", "wellformed")}})
    best = mean_se([rlhf_rows(seed)["optimum"]["objective"] for seed in SEEDS])[0]
    dpo = mean_se([rlhf_rows(seed)["dpo"]["objective"] for seed in SEEDS])[0]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    for method in ("DPO", "RLHF"):                         # J over well-formed text means nothing where there is none
        stayed = [r for r in rows if r["method"] == method and r["wellformed"] > 0.5]
        points(left, sorted(stayed, key=lambda r: r["labels"]), "labels", "objective", method, key="labels")
    for n in LABELS:
        lost = sum(r["wellformed"] <= 0.5 for r in rows if r["method"] == "RLHF" and r["labels"] == n)
        if lost:
            left.plot(n, 0.1, "x", color=C["RLHF"], ms=7)
            left.text(n * 1.07, 0.1, f"{lost} of {len(SEEDS)} runs fell apart: no reviews (not in the mean)", fontsize=7, va="center")
    points(right, [r for r in rows if r["method"].endswith("labels")], "generated", "objective", "RLHF", key="generated")
    right.axhline(dpo, color=C["DPO"], ls=":", label="DPO on the same labels: no sample at all")
    for ax in (left, right):
        ax.axhline(best, color=evaluate.COLOURS["optimum"], ls="--", label="optimum")
        ax.set_xscale("log")
        ax.legend(fontsize=8, loc="lower right")
    left.set_xlabel(f"labels (RLHF: and {SWEEP:,} generated samples)")
    right.set_xlabel("generated samples (and 40,000 labels)")
    left.set_ylabel("J = E[r*] - beta KL, held-out prompts")
    for ax, ticks in ((left, (*LABELS, 40_000)), (right, BUDGETS)):
        ax.set_xticks(ticks, [f"{t / 1000:g}k" for t in ticks])
        ax.minorticks_off()
    return rows, fig


def draw_over_optimisation(plt):
    rows = []
    for seed in SEEDS:
        for beta, c in cell(seed, "pushed").items():
            rows.append({"seed": seed, "method": "tilted", "setting": beta, **c, "wellformed": 1.0})
        for p in cell(seed, "ppo-unleashed")["path"]:
            rows.append({"seed": seed, "method": "PPO, beta = 0.05", "setting": p["generated"], "kl": p["kl"], "reward": p["reward"],
                         "learned": p.get("score", ""), "wellformed": p["wellformed"],
                         "reward_all": p["wellformed"] * p["reward"] + (1 - p["wellformed"]) * world.ILL_FORMED_REWARD,
                         "sample": p["sample"]})
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    f = [cell(seed, "frontier") for seed in SEEDS]
    mean = lambda key: torch.tensor([g[key] for g in f]).mean(0)
    left.plot(mean("kl"), mean("reward"), color=evaluate.COLOURS["optimum"], lw=2, label="optimum for r*: true reward")
    tilted = [r for r in rows if r["method"] == "tilted"]
    settings = list(dict.fromkeys(r["setting"] for r in tilted))
    of = lambda key: torch.tensor([mean_se([r[key] for r in tilted if r["setting"] == s]) for s in settings]).T
    (kl, _), (true, se), (learned, _) = of("kl"), of("reward"), of("learned")
    left.plot(kl, true, color=C["PPO, learned reward"], lw=2, label="optimum for the learned reward: true reward")
    left.fill_between(kl, true - se, true + se, color=C["PPO, learned reward"], alpha=0.25, lw=0)
    left.plot(kl, learned, ":", color=C["PPO, learned reward"], label="... and what the reward model thinks of it")
    turn = int(true.argmax())
    if turn < len(true) - 1:
        left.plot(kl[turn], true[turn], "v", color="black", ms=7, label=f"the turn: KL {kl[turn]:.1f}, true reward {true[turn]:.2f}")
    left.set_xlabel("KL(policy || reference), nats a response")
    left.set_ylabel("reward, well-formed text")
    left.legend(fontsize=7, loc="lower right")
    left.set_title("the learned reward, perfectly optimised over well-formed text (exact)", fontsize=8)
    path = [r for r in rows if r["method"] != "tilted"]
    for key, label, colour, marker in (("learned", "score by the reward model (samples, train prompts)", C["PPO, learned reward"], "s"),
                                       ("reward", "true reward of its well-formed text", C["PPO, true reward"], "o"),
                                       ("reward_all", "true reward of all its text", C["Unlikelihood"], "X")):
        ks = [k for k in dict.fromkeys(r["setting"] for r in path) if k or key != "learned"]
        m, s = zip(*(mean_se([r[key] for r in path if r["setting"] == k]) for k in ks))
        right.errorbar(ks, m, yerr=s, marker=marker, ms=4, lw=1, capsize=2, color=colour, label=label)
        if key == "reward_all":
            for seed in SEEDS:                             # the mean hides that some runs fall and some do not
                right.plot(ks, [r[key] for r in path if r["seed"] == seed], color=colour, lw=0.6, alpha=0.6)
            top = max(range(len(ks)), key=lambda i: m[i])
            far, _ = mean_se([r["kl"] for r in path if r["setting"] == ks[top]])
            right.axvline(ks[top], color="black", ls=":", lw=1, label=f"the turn: {ks[top]:,} samples, KL {far:.1f}")
    right.set_xlabel("generated samples, PPO with beta = 0.05")
    right.set_ylabel("reward")
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    right.set_title("the same by PPO, which may also leave the grammar", fontsize=8)
    return rows, fig


def draw_ppo_details(plt):
    columns = ("reward", "kl", "objective", "wellformed", "objective_all")
    rows = [{"seed": seed, "detail": name, **{k: cell(seed, f"details-{i}")[k] for k in columns},
             "share": cell(seed, f"details-{i}")["objective"] / rlhf_rows(seed)["optimum"]["objective"]}
            for seed in SEEDS for i, name in enumerate(DETAILS)]
    fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for i, name in enumerate(DETAILS):
        of = [r for r in rows if r["detail"] == name]
        m, s = mean_se([r["share"] for r in of])
        if m < 0.8:                                        # far off the scale: an arrow, and the figure beside it
            ax.plot(0.805, i, "<", ms=8, color=C["Unlikelihood"])
        else:
            ax.errorbar(m, i, xerr=s, marker="o", ms=6, capsize=3, color=C["PPO, true reward"] if i else "black")
        ax.text(1.02, i, f"{m:.1%} ± {s:.1%};  well-formed {mean_se([r['wellformed'] for r in of])[0]:.1%}", va="center", fontsize=7,
                transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(DETAILS)), list(DETAILS), fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0.8, 1.0)
    ax.set_xlabel(f"J as a share of the optimum's, PPO on the true reward, {SWEEP:,} samples")
    return rows, fig


def draw_who_labels(plt):
    rows = [{"seed": seed, "row": rlhf.TITLES[name], **r, "share": r["objective"] / rlhf_rows(seed)["optimum"]["objective"]}
            for seed in SEEDS for name in rlhf.TITLES if (r := rlhf_rows(seed).get(name))]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained", sharey=True)
    names = [n for n in dict.fromkeys(r["row"] for r in rows) if not n.startswith(("best", "reference"))]
    for i, name in enumerate(names):
        of = [r for r in rows if r["row"] == name]
        for ax, key in ((left, "share"), (right, "wellformed")):
            m, s = mean_se([r[key] for r in of])
            colour = C["DPO"] if "DPO" in name else C["PPO, learned reward"] if "PPO" in name or "REIN" in name else "black"
            ax.errorbar(m, i, xerr=s, marker="o", capsize=3, color=colour)
            ax.text(1.0, i - 0.25, f"{m:.1%}", fontsize=7, transform=ax.get_yaxis_transform(), ha="right")
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("J as a share of the optimum's (well-formed text)")
    right.set_xlabel("share of well-formed text")
    return rows, fig


def draw(name):
    plt = evaluate.plotting()
    rows, fig = globals()["draw_" + name.replace("-", "_")](plt)
    RESULTS.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(k for r in rows for k in r))
    beside = RESULTS / f"writing-{name}.csv"
    with open(beside, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    os.replace(beside, RESULTS / f"{name}.csv")
    evaluate.save_figure(fig, RESULTS / f"{name}.png")
    plt.close(fig)
    print(f"docs/paper/{name}.csv, docs/paper/{name}.png: {EXPERIMENTS[name][0]}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="\n".join(f"{name:<20} {what}" for name, (what, _) in EXPERIMENTS.items()))
    parser.add_argument("name", choices=["all", *EXPERIMENTS], metavar="NAME", help="all, or one of those listed below")
    args = parser.parse_args(argv)
    names = list(EXPERIMENTS) if args.name == "all" else [args.name]
    make_bases()
    make_cells(list(dict.fromkeys(c for name in names for c in EXPERIMENTS[name][1])))
    for name in names:
        draw(name)


if __name__ == "__main__":
    main()
