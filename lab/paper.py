"""The paper's experiments in miniature, on a world where the best answer is known.

    python -m lab.paper all            everything: about 45 minutes on 2 cores
    python -m lab.paper fig2-left      one of them; the names are listed below

Each experiment runs for three seeds. It writes docs/paper/NAME.csv, with a row for each seed and
setting, and docs/paper/NAME.png, with means and standard errors over seeds. Everything is exact,
on held-out prompts, unless it says otherwise. What was trained is kept in out/paper.

Figures and tables have the numbers of the DPO paper, https://arxiv.org/abs/2305.18290v3. Its
settings are for models that are a hundred thousand times larger. Here they are chosen anew.
"""
import argparse
import csv
import math
from dataclasses import asdict
from typing import Callable, NamedTuple

import matplotlib.pyplot as plt
import torch

import data
import evaluate
import world
from lab import baselines, seeds, tabular, work
from lab.compare import TITLES, best_of
from lab.judges import all_scores
from lab.seeds import over_seeds, result, select
from rlhf import MAX_NEW_TOKENS, Settings, by_model, learn, train_reward_model
from support import command, figures
from support.files import atomic, read_jsonl
from support.flags import TOY
from support.run import Run
from support.statistics import mean_and_se

RESULTS = seeds.ROOT / "docs" / "paper"
SWEEP = 20_480  # responses generated in each policy learning, half of lab.compare's


class Experiment(NamedTuple):
    what: str
    pieces: list  # the work that it needs; a text is a row of lab.compare
    rows: Callable  # rows(seed): the rows of its table, dicts
    draw: Callable  # draw(rows): its figure, from the rows of all seeds


EXPERIMENTS = {}  # by name; each is entered behind its functions


# ---- What several experiments share

def piece(name, function, **settings):
    return work.Piece(f"cells/{name}", function, settings)


def rows_of(*pieces):
    """The rows of a table, where pieces of work return them."""
    def rows(seed):
        found = []
        for piece in pieces:
            found += result(seed, piece)
        return found
    return rows


def pick(values, *columns):
    return {column: values[column] for column in columns if column in values}


def learning(**changes):
    """The settings of a policy learning, all of them, so that each is recorded."""
    return asdict(Settings(**{"beta": TOY["beta"], "samples": SWEEP} | changes))


def ppo(run, folder, judge, **settings):
    policy = run.new_policy()
    learn(policy, run.reference, run.score(judge), run.prompt_ids, Settings(**settings), run.seed)
    return run.measure(policy)


def dpo(run, folder, annotator="human", labels=None, **settings):
    """DPO on the first pairs of the run, by default on all."""
    examples = run.examples(annotator)[:labels]
    return run.measure(run.dpo(examples, folder, annotator, **settings))


def exact(run):
    """(P,N) each: r*, the reference's log-probabilities, normalised, and the learned reward."""
    learned = all_scores(run.reward_model("human"), run.held_out)
    return evaluate.held_out_rewards(), world.normalise(run.ref_logps), learned


def frontier(run, folder):
    betas = [10 ** (2 - k / 20) for k in range(71)]
    ref = world.normalise(run.ref_logps)  # (P, N)
    kl, reward = world.frontier(ref, evaluate.held_out_rewards(), betas)
    return {"kl": kl, "reward": reward}


NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def best_of_n(run, folder):
    """The best of N samples of the reference's well-formed text, exact for every N."""
    r, ref, learned = exact(run)
    rows = []
    for judge, scores in (("learned reward", learned), ("r*", r)):
        for n in NS:
            best = best_of(ref, scores, n)  # (P, N)
            rows.append({"judge": judge, "N": n,
                         "win_rate": world.win_rate(best, ref, r).mean().item(),
                         "kl": world.kl(best, ref).mean().item(),
                         "reward": world.expected(best, r).mean().item()})
    return rows


FRONTIER, BEST_OF_N = piece("frontier", frontier), piece("best-of-n", best_of_n)

# policies that are compared in several figures, and their names in Finished.policy
POLICIES = {"reference": "reference", "Preferred-FT": "preferred-ft",
            "PPO, learned reward": "ppo-human", "DPO": "dpo"}

OPTIMUM, LIMIT = figures.COLOURS["optimum"], figures.COLOURS["limit"]
LOOK = {"DPO": ("#0072B2", "o"), "DPO, Eq. 7 alone": ("#56B4E9", "^"),
        "PPO, learned reward": ("#E69F00", "s"), "PPO, true reward": ("#009E73", "P"),
        "Preferred-FT": ("#CC79A7", "v"),
        "Unlikelihood": ("#D55E00", "X"), "reference": ("#000000", "D"),
        "best of N, learned reward": ("#999999", "<"), "RLHF": ("#E69F00", "s"),
        "base": ("#000000", "D"), "best of 128 by r*": ("#999999", "<")}
COLOUR = {name: colour for name, (colour, _) in LOOK.items()}


def points(ax, rows, x, y, name, key):
    """Means over seeds with their standard errors, both ways, for each value of key."""
    _, mean_x, error_x = over_seeds(rows, x, key)
    _, mean_y, error_y = over_seeds(rows, y, key)
    colour, marker = LOOK[name]
    ax.errorbar(mean_x, mean_y, xerr=error_x, yerr=error_y, marker=marker, ms=5, lw=1, capsize=2,
                color=colour, label=name)


def plot_frontier(ax, label):
    """The exact frontier, a mean over seeds."""
    found = [result(seed, FRONTIER) for seed in seeds.SEEDS]
    kl = torch.tensor([f["kl"] for f in found]).mean(0)
    reward = torch.tensor([f["reward"] for f in found]).mean(0)
    ax.plot(kl, reward, color=OPTIMUM, lw=2, label=label)


def two_axes(figsize=(9, 3.8), **options):
    return plt.subplots(1, 2, figsize=figsize, layout="constrained", **options)


# ---- Figure 2, left: the reward that each method reaches at its KL

def unlikelihood(run, folder, alpha):
    policy = run.new_policy()
    baselines.unlikelihood(policy, run.examples("human"), Run(folder), run.seed, alpha)
    return run.measure(policy)


def fig2_left():
    """{(method, setting): what is trained for it, or a row of lab.compare}"""
    found = {("reference", ""): "reference"}
    for beta in (4, 2, 1, 0.5, 0.25):
        trained = piece(f"dpo-beta-{beta:g}", dpo, beta=float(beta))
        found["DPO", f"beta {beta:g}"] = "dpo" if beta == 1 else trained
    for beta in (1, 0.5, 0.25):
        trained = piece(f"plain-beta-{beta:g}", dpo, beta=float(beta), stray_weight=0.0)
        found["DPO, Eq. 7 alone", f"beta {beta:g}"] = "plain" if beta == 1 else trained
    for method, judge in (("PPO, learned reward", "human"), ("PPO, true reward", "true")):
        for kl in (0.3, 0.6, 1.5, 2.5):
            found[method, f"target KL {kl:g}"] = piece(f"ppo-{judge}-kl-{kl:g}", ppo, judge=judge,
                                                       **learning(target_kl=kl))
    found["Preferred-FT", ""] = "preferred-ft"
    for alpha in (0.05, 0.1, 0.3, 0.6):
        trained = piece(f"unlikelihood-{alpha:g}", unlikelihood, alpha=alpha)
        found["Unlikelihood", f"alpha {alpha:g}"] = "unlikelihood" if alpha == 0.1 else trained
    return found


FIG2_LEFT = fig2_left()


def share_of_frontier(frontier, row):
    """The row's gain over the reference, as a share of the frontier's gain at the row's KL.

    It is evaluate.captured without the models: the frontier's points are joined by lines.
    """
    kl, reward = frontier["kl"], frontier["reward"]
    i = next((i for i, k in enumerate(kl) if k >= row["kl"]), len(kl) - 1)
    if i == 0:
        return math.nan
    t = (row["kl"] - kl[i - 1]) / (kl[i] - kl[i - 1])
    best = reward[i - 1] + min(1.0, t) * (reward[i] - reward[i - 1])
    return (row["reward"] - reward[0]) / (best - reward[0])


def fig2_left_rows(seed):
    rows = []
    for (method, setting), trained in FIG2_LEFT.items():
        rows.append({"method": method, "setting": setting,
                     **pick(result(seed, trained), "reward", "kl", "wellformed", "objective",
                            "objective_all")})
    for best in select(result(seed, BEST_OF_N), judge="learned reward")[1:]:
        rows.append({"method": "best of N, learned reward", "setting": f"N {best['N']}",
                     **pick(best, "reward", "kl"), "wellformed": 1.0})
    for row in rows:
        if row["kl"] > 1e-9:
            row["share_of_frontier"] = share_of_frontier(result(seed, FRONTIER), row)
    return rows


def draw_fig2_left(rows):
    fig, (left, right) = two_axes((10.5, 4.4), width_ratios=[1.5, 1])
    plot_frontier(left, "frontier (exact)")
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = select(rows, method=method)
        points(left, mine, "kl", "reward", method, "setting")
        if not method.startswith("best"):
            points(right, mine, "kl", "wellformed", method, "setting")
    for ax in (left, right):
        ax.set(xlim=(-0.1, 4.8), xlabel="KL(policy || reference), nats a response")
    left.set(ylabel="true reward E[r*]")
    left.legend(fontsize=7, loc="lower right")
    left.set_title("over well-formed text", fontsize=9)
    right.set(ylim=(0, 1.03), ylabel="share of the policy's text that is well-formed")
    right.set_title("and how much of its text that is", fontsize=9)
    return fig


EXPERIMENTS["fig2-left"] = Experiment(
    "reward against KL: DPO, PPO, Preferred-FT, Unlikelihood, best-of-N under the exact frontier",
    [FRONTIER, BEST_OF_N, *FIG2_LEFT.values()], fig2_left_rows, draw_fig2_left)


# ---- Figure 2, right: does a policy win at other sampling temperatures?

class Tempered(torch.nn.Module):
    """A GPT that samples at a temperature: its logits are divided by it. 0 is greedy."""

    def __init__(self, gpt, temperature):
        super().__init__()
        self.gpt, self.scale = gpt, 1 / max(temperature, 1e-6)
        self.new_cache = gpt.new_cache

    def forward(self, tokens, cache=None):
        return self.gpt(tokens, cache) * self.scale


def temperatures(run, folder):
    """Win rates against the reference's own samples at temperature 1."""
    r, rows = evaluate.held_out_rewards(), []  # (P, N)
    ref_all, r_all = world.with_ill_formed(run.ref_logps, r)  # (P, N+1) each
    for method, name in POLICIES.items():
        for t in (0, 0.25, 0.5, 0.75, 1):
            logps = evaluate.exact_logps(Tempered(run.policy(name), t), run.held_out)  # (P, N)
            logps_all, _ = world.with_ill_formed(logps, r)  # (P, N+1)
            rows.append({"method": method, "temperature": t,
                         "win_rate": world.win_rate(logps_all, ref_all, r_all).mean().item()})
    return rows


TEMPERATURES = piece("temperatures", temperatures)


def draw_fig2_right(rows):
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in POLICIES:
        points(ax, select(rows, method=name), "temperature", "win_rate", name, "temperature")
    ax.axhline(0.5, color=LIMIT, ls="--", lw=1)
    ax.set(xlabel="sampling temperature of the policy",
           ylabel="win rate against the reference's samples", ylim=(0, 1.02))
    ax.legend(fontsize=8)
    return fig


EXPERIMENTS["fig2-right"] = Experiment(
    "win rate against sampling temperature",
    [TEMPERATURES], rows_of(TEMPERATURES), draw_fig2_right)


# ---- Figure 3: pairs that others wrote, so that no SFT model fits them
# The reference is Preferred-FT on these pairs, as the paper has it (section 4, outline). Policies
# are compared with the responses that were chosen in the data.

def two_samplers(prompts):
    """Who writes the pairs: a keen writer, the grammar tilted towards reward, and a careless one,
    who takes every review alike. Log-probabilities, (P,N) each."""
    grammar = world.grammar_logps(prompts)
    keen = world.optimal_policy(grammar, world.rewards(prompts, world.responses()), 2.0)
    return keen, torch.full_like(grammar, -math.log(grammar.size(1)))


def make_pairs(prompts, n, seed):
    """n pairs, less those of equal responses, labelled by the true reward."""
    texts, generator = world.responses(), torch.Generator().manual_seed(seed)
    prompt = torch.arange(n) % len(prompts)  # (n,)
    keen, careless = [data.draw(logps, prompt, generator) for logps in two_samplers(prompts)]
    rewards = world.rewards(prompts, texts)  # (P, N)
    p_keen = world.preference_prob(rewards[prompt, keen], rewards[prompt, careless])  # (n,)
    keen_wins = torch.rand(n, generator=generator, dtype=torch.float64) < p_keen  # (n,)
    chosen = torch.where(keen_wins, keen, careless)  # (n,)
    rejected = torch.where(keen_wins, careless, keen)  # (n,)
    pairs = []
    for x, w, l in torch.stack([prompt, chosen, rejected], 1).tolist():
        if w != l:
            pairs.append(data.Pair(prompts[x], texts[w], texts[l]))
    return pairs


def chosen_logps(prompts, r):
    """The exact distribution of the data's chosen responses. r (P,N): the rewards. (P,N)"""
    keen, careless = [logps.exp() for logps in two_samplers(prompts)]  # (P, N) each
    p = torch.stack([tabular.preferences(row) for row in r])  # (P, N, N)
    keen_wins = keen * (p @ careless[:, :, None])[:, :, 0]  # (P, N)
    careless_wins = careless * (p @ keen[:, :, None])[:, :, 0]  # (P, N)
    return (keen_wins + careless_wins).log()


def pairs_of_others(run, folder):
    pairs = make_pairs(run.train_prompts, run.flags["pairs"], run.seed)
    examples, _ = data.tokenize(pairs, run.tokenizer)
    r = evaluate.held_out_rewards()  # (P, N)
    chosen = world.normalise(chosen_logps(run.held_out, r))  # (P, N)
    chosen_all, r_all = world.with_ill_formed(chosen, r)  # (P, N+1) each

    def win_rate(logps):
        logps_all, _ = world.with_ill_formed(logps, r)  # (P, N+1)
        return world.win_rate(logps_all, chosen_all, r_all).mean().item()

    def measure(policy):
        return {"win_rate": win_rate(evaluate.exact_logps(policy, run.held_out))}

    reference = baselines.preferred_ft(run.new_policy(), examples, Run(folder), run.seed)
    ref_logps = evaluate.exact_logps(reference.requires_grad_(False), run.held_out)  # (P, N)
    policy = run.dpo(examples, folder, reference=reference, measure=measure,
                     measure_at=[share / 10 for share in range(11)])
    win_rates = {
        "base": win_rate(run.ref_logps), "Preferred-FT": win_rate(ref_logps),
        "best of 128 by r*": win_rate(best_of(world.normalise(ref_logps), r, 128)),
        "DPO": measure(policy)["win_rate"]}
    rows = [{"method": name, "step": "", "win_rate": win} for name, win in win_rates.items()]
    for row in read_jsonl(folder / "metrics.jsonl"):
        if "win_rate" in row:
            rows.append({"method": "DPO", **pick(row, "step", "win_rate")})
    return rows


FIG3 = piece("fig3", pairs_of_others)


def draw_fig3(rows):
    fig, (left, right) = two_axes(width_ratios=[1, 1.4])
    names, means, errors = over_seeds(select(rows, step=""), "win_rate", "method")
    for i, (name, mean, error) in enumerate(zip(names, means, errors)):
        left.bar(i, mean, yerr=error, color=COLOUR[name], capsize=3)
        left.text(i, mean + 0.03, f"{mean:.0%}", ha="center", fontsize=8)
    left.set_xticks(range(len(names)), [name.replace(" by", "\nby") for name in names], fontsize=8)
    left.axhline(0.5, color=LIMIT, ls="--", lw=1)
    points(right, [row for row in rows if row["step"] != ""], "step", "win_rate", "DPO", "step")
    right.axhline(0.5, color=LIMIT, ls="--", lw=1, label="as good as the chosen responses")
    right.set(xlabel="DPO step")
    for ax in (left, right):
        ax.set(ylabel="win rate against the data's chosen responses", ylim=(0, 1))
    right.legend(fontsize=8, loc="lower right")
    return fig


EXPERIMENTS["fig3"] = Experiment(
    "pairs by two other samplers, Preferred-FT as the reference: win rate against the data's "
    "chosen responses", [FIG3], rows_of(FIG3), draw_fig3)


# ---- Table 1: prompts that were trained on, and combinations that never were

WHERE = ("trained", "held out")


def generalisation(run, folder):
    known, rows = {}, []
    for where, prompts in zip(WHERE, (run.train_prompts, run.held_out)):
        r = world.rewards(prompts, world.responses())  # (P, N)
        ref = evaluate.exact_logps(run.reference, prompts)  # (P, N)
        normal = world.normalise(ref)  # (P, N)
        star = world.optimal_policy(normal, r, run.beta)  # (P, N)
        best = tabular.objective(star, normal, r, run.beta).mean().item()
        known[where] = prompts, r, ref, best
    for method, name in POLICIES.items():
        for where, (prompts, r, ref, best) in known.items():
            logps = evaluate.exact_logps(run.policy(name), prompts)  # (P, N)
            rows.append({"method": method, "prompts": where,
                         **evaluate.measure(logps, ref, run.beta, r), "objective_optimal": best})
    return rows


GENERALISATION = piece("generalisation", generalisation)


def draw_table1(rows):
    fig, (left, right) = two_axes()
    rows = [row | {"share": row["objective"] / row["objective_optimal"]} for row in rows]
    names = list(POLICIES)[1:]
    for ax, column, label in ((left, "win_rate", "win rate against the reference"),
                              (right, "share", "J as a share of the optimum's")):
        for i, name in enumerate(names):
            _, means, errors = over_seeds(select(rows, method=name), column, "prompts")
            for k, where in enumerate(WHERE):
                x = i + 0.38 * (k - 0.5)
                ax.bar(x, means[k], 0.36, yerr=errors[k], color=COLOUR[name], capsize=3,
                       alpha=0.55 if k else 1, hatch="//" if k else "",
                       label=None if i else f"prompts {where}")
                ax.text(x, means[k] + 0.02, f"{means[k]:.1%}", ha="center", fontsize=7)
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set(ylabel=label, ylim=(0, 1.12))
    left.legend(fontsize=8, loc="upper left")
    return fig


EXPERIMENTS["table1"] = Experiment(
    "prompts trained on, and combinations never seen",
    [GENERALISATION], rows_of(GENERALISATION), draw_table1)


# ---- Figure 4: best of N, ranked by the learned reward and by r*

def draw_fig4(rows):
    fig, (left, right) = two_axes()
    look = {"learned reward": (COLOUR["PPO, learned reward"], "s"),
            "r*": (COLOUR["PPO, true reward"], "o")}
    for judge, (colour, marker) in look.items():
        for ax, column in ((left, "win_rate"), (right, "kl")):
            _, means, errors = over_seeds(select(rows, judge=judge), column, "N")
            ax.errorbar(NS, means, yerr=errors, marker=marker, ms=5, lw=1, capsize=2,
                        color=colour, label=f"ranked by {judge} (exact)")
    left.plot(NS, [n / (n + 1) for n in NS], "--", color=LIMIT, label="bound N/(N+1)")
    right.plot(NS, [math.log(n) - (n - 1) / n for n in NS], "--", color=LIMIT,
               label="bound log N - (N-1)/N")
    left.set(ylabel="win rate against one sample")
    right.set(ylabel="KL(best of N || reference), nats")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(NS, NS)
        ax.set(xlabel="N, samples drawn for every answer")
        ax.legend(fontsize=8)
    return fig


EXPERIMENTS["fig4"] = Experiment(
    "best of N by the learned reward and by r*, beside the bounds",
    [BEST_OF_N], rows_of(BEST_OF_N), draw_fig4)


# ---- Two kinds of efficiency: how many labels a method needs, and how many generated samples

LABELS = (2_500, 5_000, 10_000, 20_000, 40_000)
SAMPLES = (2_560, 5_120, 10_240, 20_480, 40_960)
MANY = "RLHF, 40,000 labels"


def rlhf_on(run, folder, labels, **settings):
    """A reward model from the first labels, then PPO."""
    examples, policy = run.examples("human")[:labels], run.new_policy()
    score = by_model(train_reward_model(run.reference, examples, Run(folder), run.seed))
    learn(policy, run.reference, score, run.prompt_ids, Settings(**settings), run.seed)
    return run.measure(policy)


def labels_and_samples():
    """{(method, labels, samples): what is trained for it, or a row of lab.compare}"""
    many = {n: piece(f"ppo-samples-{n}", ppo, judge="human", **learning(samples=n))
            for n in SAMPLES[:-1]} | {SAMPLES[-1]: "ppo-human"}
    found = {}
    for n in LABELS[:-1]:
        found["DPO", n, 0] = piece(f"dpo-labels-{n}", dpo, labels=n)
        found["RLHF", n, SWEEP] = piece(f"ppo-labels-{n}", rlhf_on, labels=n, **learning())
    found |= {("DPO", LABELS[-1], 0): "dpo", ("RLHF", LABELS[-1], SWEEP): many[SWEEP]}
    for n in SAMPLES:
        found[MANY, LABELS[-1], n] = many[n]
    return found


LABELS_AND_SAMPLES = labels_and_samples()


def labels_and_samples_rows(seed):
    for (method, labels, generated), trained in LABELS_AND_SAMPLES.items():
        yield {"method": method, "labels": labels, "generated": generated,
               **pick(result(seed, trained), "reward", "kl", "objective", "wellformed")}


def mean_objective(name):
    return mean_and_se([result(seed, name)["objective"] for seed in seeds.SEEDS])[0]


def draw_labels_and_samples(rows):
    fig, (left, right) = two_axes(sharey=True)
    for method in ("DPO", "RLHF"):
        mine = select(rows, method=method)
        # without well-formed text, J over well-formed text means nothing
        stayed = [row for row in mine if row["wellformed"] > 0.5]
        stayed.sort(key=lambda row: row["labels"])
        points(left, stayed, "labels", "objective", method, "labels")
        for n in LABELS:
            lost = len(select(mine, labels=n)) - len(select(stayed, labels=n))
            if lost:
                left.plot(n, 0.1, "x", color=COLOUR[method], ms=7)
                left.text(n * 1.07, 0.1, f"{lost} of {len(seeds.SEEDS)} runs fell apart: no "
                          "reviews (not in the mean)", fontsize=7, va="center")
    points(right, select(rows, method=MANY), "generated", "objective", "RLHF", "generated")
    right.axhline(mean_objective("dpo"), color=COLOUR["DPO"], ls=":",
                  label="DPO on the same labels: no sample at all")
    for ax, ticks in ((left, LABELS), (right, SAMPLES)):
        ax.axhline(mean_objective("optimum"), color=OPTIMUM, ls="--", label="optimum")
        ax.set_xscale("log")
        ax.legend(fontsize=8, loc="lower right")
        ax.set_xticks(ticks, [f"{tick / 1000:g}k" for tick in ticks])
        ax.minorticks_off()
    left.set(xlabel=f"labels (RLHF: and {SWEEP:,} generated samples)",
             ylabel="J = E[r*] - beta KL, held-out prompts")
    right.set(xlabel="generated samples (and 40,000 labels)")
    return fig


EXPERIMENTS["labels-and-samples"] = Experiment(
    "two kinds of efficiency: labels, and generated samples",
    list(LABELS_AND_SAMPLES.values()), labels_and_samples_rows, draw_labels_and_samples)


# ---- Over-optimisation: the true reward as the learned reward is pushed

UNLEASHED = "PPO, beta = 0.05"


def pushed(run, folder):
    """The reference tilted by the learned reward, harder and harder: what a perfect optimiser of
    that reward would reach. Exact."""
    r, ref, learned = exact(run)
    rows = []
    for k in range(41):
        beta = 10 ** (1 - k / 16)
        tilted = world.optimal_policy(ref, learned, beta)  # (P, N)
        rows.append({"method": "tilted", "setting": f"{beta:.6g}",
                     "kl": world.kl(tilted, ref).mean().item(),
                     "reward": world.expected(tilted, r).mean().item(),
                     "learned": world.expected(tilted, learned).mean().item(), "wellformed": 1.0})
    return rows


def unleashed(run, folder, **settings):
    """PPO on the learned reward, measured on the way, with what it writes."""
    policy, rows = run.new_policy(), []
    prompt = run.tokenizer.encode_ordinary(run.held_out[0])

    def at_step(generated):
        if generated % (SWEEP // 10) == 0:
            with torch.random.fork_rng():  # so that PPO draws what it would have drawn
                ids = policy.generate([prompt], MAX_NEW_TOKENS, eos_id=run.tokenizer.eot_token)[0]
            row = pick(run.measure(policy), "kl", "reward", "wellformed")
            ill_formed = (1 - row["wellformed"]) * world.ILL_FORMED_REWARD
            rows.append({"method": UNLEASHED, "setting": generated, **row,
                         "reward_all": row["wellformed"] * row["reward"] + ill_formed,
                         "sample": run.tokenizer.decode(ids).removesuffix("<|endoftext|>")})

    history = learn(policy, run.reference, run.score("human"), run.prompt_ids,
                    Settings(**settings), run.seed, at_step)
    scores = {batch["generated"]: batch["score"] for batch in history}
    for row in rows[1:]:  # there is no score before the first batch
        row["learned"] = scores[row["setting"]]
    return rows


PUSHED = piece("pushed", pushed), piece("ppo-unleashed", unleashed, **learning(beta=0.05))


def draw_tilted(ax, rows):
    plot_frontier(ax, "optimum for r*: true reward")
    colour = COLOUR["PPO, learned reward"]
    (kl, _), (true, error), (learned, _) = [
        torch.tensor(over_seeds(rows, column, "setting")[1:])
        for column in ("kl", "reward", "learned")]
    ax.plot(kl, true, color=colour, lw=2, label="optimum for the learned reward: true reward")
    ax.fill_between(kl, true - error, true + error, color=colour, alpha=0.25, lw=0)
    ax.plot(kl, learned, ":", color=colour, label="... and what the reward model thinks of it")
    turn = int(true.argmax())
    if turn < len(true) - 1:
        ax.plot(kl[turn], true[turn], "v", color="black", ms=7,
                label=f"the turn: KL {kl[turn]:.1f}, true reward {true[turn]:.2f}")
    ax.set(xlabel="KL(policy || reference), nats a response", ylabel="reward, well-formed text")
    ax.legend(fontsize=7, loc="lower right")
    ax.set_title("the learned reward, perfectly optimised over well-formed text (exact)",
                 fontsize=8)


def draw_unleashed(ax, rows):
    look = {"learned": ("score by the reward model (samples, train prompts)",
                        COLOUR["PPO, learned reward"], "s"),
            "reward": ("true reward of its well-formed text", COLOUR["PPO, true reward"], "o"),
            "reward_all": ("true reward of all its text", COLOUR["Unlikelihood"], "X")}
    for column, (label, colour, marker) in look.items():
        measured = [row for row in rows if column in row]
        samples, means, errors = over_seeds(measured, column, "setting")
        ax.errorbar(samples, means, yerr=errors, marker=marker, ms=4, lw=1, capsize=2,
                    color=colour, label=label)
    for seed in seeds.SEEDS:  # the mean hides that some runs fall and some do not
        mine = [row["reward_all"] for row in select(rows, seed=seed)]
        ax.plot(samples, mine, color=colour, lw=0.6, alpha=0.6)
    turn = means.index(max(means))
    _, kls, _ = over_seeds(rows, "kl", "setting")
    ax.axvline(samples[turn], color="black", ls=":", lw=1,
               label=f"the turn: {samples[turn]:,} samples, KL {kls[turn]:.1f}")
    ax.set(xlabel="generated samples, PPO with beta = 0.05", ylabel="reward")
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    ax.set_title("the same by PPO, which may also leave the grammar", fontsize=8)


def draw_over_optimisation(rows):
    fig, (left, right) = two_axes((9.5, 4))
    draw_tilted(left, select(rows, method="tilted"))
    draw_unleashed(right, select(rows, method=UNLEASHED))
    return fig


EXPERIMENTS["over-optimisation"] = Experiment(
    "true reward as the learned reward is pushed",
    [FRONTIER, *PUSHED], rows_of(*PUSHED), draw_over_optimisation)


# ---- PPO on the true reward, with and without the details that are said to matter

DETAILS = {"as it is": {},
           "lambda = 0.95": {"lam": 0.95},
           "no advantage normalisation": {"normalise_advantages": False},
           "no ratio clip": {"clip": None},
           "value clip 0.2": {"clip_values": 0.2},
           "reward scaling": {"scale_rewards": True},
           "no learning rate annealing": {"anneal_lr": False},
           "no gradient clipping": {"max_grad_norm": None},
           "no critic: REINFORCE++": {"critic": False}}
DETAIL_PIECES = [piece(f"details-{i}", ppo, judge="true", **learning(**changes))
                 for i, changes in enumerate(DETAILS.values())]


def ppo_details_rows(seed):
    best = result(seed, "optimum")["objective"]
    for name, trained in zip(DETAILS, DETAIL_PIECES):
        values = pick(result(seed, trained), "reward", "kl", "objective", "wellformed",
                      "objective_all")
        yield {"detail": name, **values, "share": values["objective"] / best}


def draw_ppo_details(rows):
    fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    details, shares, errors = over_seeds(rows, "share", "detail")
    _, wellformed, _ = over_seeds(rows, "wellformed", "detail")
    for i, (share, error) in enumerate(zip(shares, errors)):
        if share < 0.8:  # far off the scale: an arrow, and the number beside it
            ax.plot(0.805, i, "<", ms=8, color=COLOUR["Unlikelihood"])
        else:
            ax.errorbar(share, i, xerr=error, marker="o", ms=6, capsize=3,
                        color=COLOUR["PPO, true reward"] if i else "black")
        ax.text(1.02, i, f"{share:.1%} ± {error:.1%};  well-formed {wellformed[i]:.1%}",
                va="center", fontsize=7, transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(details)), details, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlim=(0.8, 1.0), xlabel="J as a share of the optimum's, PPO on the true reward, "
                                   f"{SWEEP:,} samples")
    return fig


EXPERIMENTS["ppo-details"] = Experiment(
    "PPO with and without the details that are said to matter",
    DETAIL_PIECES, ppo_details_rows, draw_ppo_details)


# ---- The table of lab.compare, and each judge at its own best beta
# A judge whose scores differ less than r* does is held on a shorter leash by the same beta. So the
# AI's rows are there twice: at the common beta, and at the AI judge's best one. J has the run's
# beta in every row.

AI_BETA = 0.7  # near the best one for the AI judge, which `judges` finds
AT_AI_BETA = {
    "dpo-ai": piece("dpo-ai-own-beta", dpo, annotator="ai", beta=AI_BETA),
    "ppo-ai": piece("ppo-ai-own-beta", ppo, judge="ai",
                    **learning(beta=AI_BETA, samples=Settings.samples)),
    "ppo-judge": piece("ppo-judge-own-beta", ppo, judge="judge",
                       **learning(beta=AI_BETA, samples=Settings.samples))}


def judges(run, folder):
    """The best policy for a judge's scores, at the common beta and at the judge's best one. The
    AI judge is 0.6 r* + 0.4 very. The other two have its smaller scale alone, or its taste."""
    ref, r = world.normalise(run.ref_logps), evaluate.held_out_rewards()  # (P, N) each
    judge = world.rewards(run.held_out, world.responses(), world.ai_score)  # (P, N)
    scores = {"the AI judge": judge, "0.6 r*": 0.6 * r, "r* + 0.4 very": judge + 0.4 * r}
    rows = []
    for name, score in scores.items():  # (P, N)
        stars = {k / 100: world.optimal_policy(ref, score, k / 100) for k in range(40, 161, 2)}
        best = max(stars, key=lambda b: tabular.objective(stars[b], ref, r, run.beta).mean())
        for beta, which in ((run.beta, ""), (best, ", its best beta")):
            row = evaluate.measure(stars[beta], run.ref_logps, run.beta)
            rows.append({"row": f"optimum for {name}{which}", "beta": beta, **row})
    return rows


JUDGES = piece("judges", judges)


def who_labels_rows(seed):
    best = result(seed, "optimum")
    rows = []
    for name, title in TITLES.items():
        rows.append({"row": title, "beta": TOY["beta"], **result(seed, name)})
        if name in AT_AI_BETA:
            rows.append({"row": f"{title}, beta {AI_BETA:g}", "beta": AI_BETA,
                         **result(seed, AT_AI_BETA[name])})
    for row in result(seed, JUDGES):
        if row["row"] not in TITLES.values():
            rows.append(row)
    return [row | {"share": row["objective"] / best["objective"]} for row in rows]


def draw_who_labels(rows):
    fig, (left, right) = two_axes((9.5, 6.2), sharey=True)
    shown = [row for row in rows if not row["row"].startswith(("best", "reference"))]
    for ax, column in ((left, "share"), (right, "wellformed")):
        titles, means, errors = over_seeds(shown, column, "row")
        for i, (title, mean, error) in enumerate(zip(titles, means, errors)):
            colour = "black"
            if "DPO" in title:
                colour = COLOUR["DPO"]
            elif "PPO" in title or "REINFORCE" in title:
                colour = COLOUR["RLHF"]
            own_beta = "beta" in title
            ax.errorbar(mean, i, xerr=error, marker="o", capsize=3, color=colour,
                        mfc="white" if own_beta else colour)
            ax.text(1.0, i - 0.25, f"{mean:.1%}", fontsize=7, ha="right",
                    transform=ax.get_yaxis_transform())
    left.set_yticks(range(len(titles)), titles, fontsize=8)
    left.invert_yaxis()
    left.set(xlabel="J (with beta = 1) as a share of the optimum's,\nwell-formed text")
    right.set(xlabel="share of well-formed text")
    return fig


EXPERIMENTS["who-labels"] = Experiment(
    "RLHF, RLAIF, d-RLAIF and DPO in one table, each judge also at its own best beta",
    [JUDGES, *AT_AI_BETA.values()], who_labels_rows, draw_who_labels)


# ---- The command

def write_csv(rows, path):
    columns = {}  # in the order in which rows have them
    for row in rows:
        columns |= row
    with atomic(path) as beside, open(beside, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [row.get(column, "") for column in columns]
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def draw(name):
    """Write the table and the figure of an experiment whose pieces of work are done."""
    experiment, rows = EXPERIMENTS[name], []
    for seed in seeds.SEEDS:
        for row in experiment.rows(seed):
            rows.append({"seed": seed, **row})
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_csv(rows, RESULTS / f"{name}.csv")
    figures.save(experiment.draw(rows), RESULTS / f"{name}.png")
    print(f"docs/paper/{name}.csv, docs/paper/{name}.png: {experiment.what}")


def main(argv=None):
    listed = "\n".join(f"{name:<20} {e.what}" for name, e in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=listed,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["all", *EXPERIMENTS], metavar="NAME",
                        help="all, or one of those listed below")
    args = parser.parse_args(argv)
    names = list(EXPERIMENTS) if args.name == "all" else [args.name]
    seeds.make_runs()
    pieces = {}  # by name: what several experiments need is done once
    for name in names:
        for piece in EXPERIMENTS[name].pieces:
            if isinstance(piece, work.Piece):
                pieces[piece.name] = piece
    work.do(pieces.values(), [seeds.folder(seed) for seed in seeds.SEEDS])
    for name in names:
        draw(name)


if __name__ == "__main__":
    command.run(main, again="The same command goes on with what is missing.")
