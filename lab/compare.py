"""Everything that DPO is compared with, on a finished toy run of train.py.

    python -m lab.compare DIR     DIR: the folder of the run

What the table needs is trained from the run's own reference and pairs, and kept in DIR/rlhf. The
measurements are exact, on held-out prompts. They go to DIR/rlhf.json, the figure to DIR/rlhf.png.
"""
import argparse
import time
from dataclasses import asdict

import matplotlib.pyplot as plt
import torch

import evaluate
import world
from lab import baselines, tabular, work
from lab.finished import Finished
from lab.judges import all_scores, judge_quality
from rlhf import Settings, learn, train_reward_model
from support import checkpoints, command, figures, show
from support.files import read_jsonl, write_json
from support.flags import number
from support.machine import device, pick_device
from support.run import Run

TITLES = {
    "reference": "reference (SFT)",
    "ppo-human": "RLHF: human labels, reward model, PPO",
    "ppo-ai": "RLAIF: AI labels, reward model, PPO",
    "ppo-judge": "d-RLAIF: PPO on the judge's scores",
    "dpo": "DPO on human labels",
    "plain": "DPO on human labels, Eq. 7 alone",
    "dpo-ai": "DPO on AI labels",
    "reinforce-human": "REINFORCE++ on the reward model",
    "ppo-true": "PPO on the true reward",
    "preferred-ft": "Preferred-FT",
    "unlikelihood": "Unlikelihood, alpha = 0.1",
    "best-of-16": "best of 16 by the reward model",
    "best-of-128": "best of 128 by the reward model",
    "optimum-learned": "optimum for the reward model",
    "optimum-judge": "optimum for the AI judge",
    "optimum": "optimum (pi*)",
}


# ---- What is trained. Each function leaves a model in its folder.

def cost(labels=0, generated=0, models=1, seconds=0.0):
    """labels: pairs that somebody compared. generated: responses. models: how many the training
    needs in memory at once. A model that only measures does not count."""
    return {"labels": labels, "generated": generated, "models": models, "seconds": seconds}


def reward(run, folder, annotator):
    start = time.time()
    model = train_reward_model(run.reference, run.examples(annotator), Run(folder), run.seed)
    seconds = time.time() - start
    checkpoints.save(model.state_dict(), folder / "reward.pt")
    return {"cost": cost(run.flags["pairs"], seconds=seconds),
            "measured": judge_quality(all_scores(model, run.held_out), run.held_out)}


def keep(run, folder, policy, start, **costs):
    seconds = time.time() - start
    checkpoints.save_model(policy, folder / "policy.pt",
                           reference=checkpoints.fingerprint(run.reference))
    costs = {"labels": run.flags["pairs"], "seconds": seconds} | costs
    return {"cost": cost(**costs), "measured": run.measure(policy)}


def policy_learning(run, folder, judge, **settings):
    """PPO, or REINFORCE++ where the settings say that there is no critic."""
    start, policy, settings = time.time(), run.new_policy(), Settings(**settings)
    history = learn(policy, run.reference, run.score(judge), run.prompt_ids, settings, run.seed,
                    name=folder.name)
    write_json(history, folder / "history.json")
    costs = {"generated": history[-1]["generated"]}
    # policy and reference, the critic, and a judge that is a model
    costs["models"] = 2 + settings.critic + (judge != "true")
    if judge in ("true", "judge"):
        costs["labels"] = 0
    return keep(run, folder, policy, start, **costs)


def dpo(run, folder, annotator):
    start = time.time()
    return keep(run, folder, run.dpo(run.examples(annotator), folder, annotator), start)


def baseline(run, folder, method):
    start, policy = time.time(), run.new_policy()
    getattr(baselines, method)(policy, run.examples("human"), Run(folder), run.seed)
    return keep(run, folder, policy, start)


def pieces(learning):
    """All that is trained. learning: the rlhf.Settings of policy learning, a dict."""
    human, ai = "rlhf/reward-human", "rlhf/reward-ai"

    def policy(name, judge, needs=(), **other):
        settings = {"judge": judge} | learning | other
        return work.Piece(f"rlhf/{name}", policy_learning, settings, needs)

    return [
        work.Piece(human, reward, {"annotator": "human"}),
        policy("ppo-human", "human", (human,)),
        policy("reinforce-human", "human", (human,), critic=False),
        work.Piece(ai, reward, {"annotator": "ai"}),
        policy("ppo-ai", "ai", (ai,)),
        work.Piece("rlhf/dpo-ai", dpo, {"annotator": "ai"}),
        policy("ppo-true", "true"),
        work.Piece("rlhf/unlikelihood", baseline, {"method": "unlikelihood"}),
        policy("ppo-judge", "judge"),
        work.Piece("rlhf/preferred-ft", baseline, {"method": "preferred_ft"}),
    ]


# ---- The rows of the table

def dpo_seconds(run, stage):
    """How long a stage of train.py took, "dpo" or "plain", from the speeds that it has logged."""
    seconds, before = 0.0, -1
    for row in read_jsonl(run.folder / "metrics.jsonl"):
        if row["stage"] == stage and "pairs_per_second" in row:
            pairs = (row["step"] - before) * run.flags["batch_size"]
            seconds, before = seconds + pairs / row["pairs_per_second"], row["step"]
    return seconds


def best_of(ref, scores, n):
    """tabular.best_of_n for each prompt. (P, N), (P, N) -> (P, N)"""
    return torch.stack([tabular.best_of_n(q, s, n) for q, s in zip(ref, scores)])


def compare(run):
    """The rows of the table, in its order, and how good the judges are. A dict."""
    ref, labels, rows = run.ref_logps, run.flags["pairs"], {}
    normal = world.normalise(ref)  # (P, N)
    rewards = {who: work.result(run.folder, f"rlhf/reward-{who}") for who in ("human", "ai")}

    def measure(logps, **costs):
        return evaluate.measure(logps, ref, run.beta) | cost(**costs)

    rows["reference"] = measure(ref)
    for name in ("dpo", "plain"):
        if name in run.models:
            seconds = dpo_seconds(run, stage=name)
            rows[name] = run.measure(run.models[name]) | cost(labels, seconds=seconds)
    for name in TITLES:
        trained = work.result(run.folder, f"rlhf/{name}")
        if trained:
            rows[name] = trained["measured"] | trained["cost"]
    for name in ("ppo-human", "ppo-ai", "reinforce-human"):  # they need a reward model first
        rows[name]["seconds"] += rewards[name.split("-")[1]]["cost"]["seconds"]
    # best-of-N samples of the reference's well-formed text
    scores = all_scores(run.reward_model("human"), run.held_out)  # (P, N)
    for n in (16, 128):
        rows[f"best-of-{n}"] = measure(best_of(normal, scores, n), labels=labels, generated=n,
                                       models=2, seconds=rewards["human"]["cost"]["seconds"])
    # what a perfect optimiser would reach with a judge's scores instead of the true reward
    judge = world.rewards(run.held_out, world.responses(), world.ai_score)  # (P, N)
    for name, worth, compared in (("learned", scores, labels), ("judge", judge, 0)):
        tilted = world.optimal_policy(normal, worth, run.beta)  # (P, N)
        rows[f"optimum-{name}"] = measure(tilted, labels=compared, models=0)
    rows["optimum"] = evaluate.optimum(ref, run.beta, run.beta) | cost(models=0)
    quality = {who: done["measured"] for who, done in rewards.items()}
    quality["judge"] = judge_quality(judge, run.held_out)
    return {"beta": run.beta, "reward_models": quality,
            "rows": {name: rows[name] for name in TITLES if name in rows}}


def table(comparison):
    """The comparison as text, a line for each row."""
    rows = comparison["rows"]
    lines = [f"{'held-out prompts':<40}{'labels':>8}{'samples':>9}{'models':>8}"
             f"{'seconds':>9}{'reward':>9}{'KL':>8}{'J':>8}{'J/J*':>8}{'well-f.':>9}{'J, all':>9}"]
    for name, r in rows.items():
        samples = f"{r['generated']:,}" + ("/ans" if name.startswith("best") else "")
        share = r["objective"] / rows["optimum"]["objective"]
        lines.append(f"{TITLES[name]:<40}{r['labels']:>8,}{samples:>9}{r['models']:>8}"
                     f"{r['seconds']:>9.0f}{r['reward']:>9.3f}{r['kl']:>8.3f}{r['objective']:>8.3f}"
                     f"{share:>8.1%}{r['wellformed']:>9.1%}{r['objective_all']:>9.3f}")
    lines.append("""
labels: the pairs that the annotator compared. samples: the responses generated, in best-of-N for
each answer. models: how many the training needs in memory. seconds: those of the reward model are
included, and trainings run side by side. reward, KL (nats) and J = E[r*] - beta KL are over
well-formed text. In "J, all", ill-formed text counts at its low reward.""")
    judges = {"human": "The reward model, human labels,", "ai": "The reward model, AI labels,",
              "judge": "The AI judge itself"}
    for who, name in judges.items():
        q = comparison["reward_models"][who]
        lines.append(f"{name:<32} ranks {q['accuracy']:.1%} of human labels rightly (ceiling "
                     f"{q['ceiling']:.1%}); Spearman with r* {q['spearman']:.3f}; calibration "
                     f"error {q['calibration_error']:.3f}")
    return "\n".join(lines)


# ---- The figure

LOOK = {"reference": ("D", "#000000"), "ppo-human": ("o", "#E69F00"), "ppo-ai": ("o", "#56B4E9"),
        "ppo-judge": ("s", "#56B4E9"), "dpo": ("o", "#0072B2"), "plain": ("s", "#D55E00"),
        "dpo-ai": ("^", "#0072B2"), "reinforce-human": ("^", "#E69F00"),
        "ppo-true": ("P", "#009E73"), "preferred-ft": ("v", "#CC79A7"),
        "unlikelihood": ("X", "#CC79A7"), "best-of-16": ("<", "#999999"),
        "best-of-128": (">", "#999999"), "optimum": ("*", "#009E73")}


def plot_plane(rows, ref_logps, path):
    """The rows on the reward-KL plane, under the exact frontier: all of it, and near pi*."""
    far = 1.25 * max(row["kl"] for row in rows.values())
    frontier = figures.frontier_to(world.normalise(ref_logps), evaluate.held_out_rewards(), far)
    fig, (whole, near) = plt.subplots(1, 2, figsize=(10.5, 5.6), layout="constrained")
    for ax in (whole, near):
        ax.plot(*frontier, color=figures.COLOURS["optimum"], lw=2,
                label="frontier: no policy is above it (exact)")
        for name, (marker, colour) in LOOK.items():
            if name in rows:
                row, star = rows[name], marker == "*"
                ax.plot(row["kl"], row["reward"], marker, ms=13 if star else 7, color=colour,
                        mec="white", mew=0.6, ls="", zorder=2 if star else 3,
                        label=f"{TITLES[name]} ({row['wellformed']:.0%} well-formed)")
        ax.set_xlabel("KL(policy || reference), nats a response")
    whole.set_ylabel("true reward E[r*]")
    whole.set_title("held-out prompts, well-formed text, exact", fontsize=9)
    star = rows["optimum"]
    near.set_xlim(0.3 * star["kl"], 1.3 * star["kl"])
    near.set_ylim(0.5 * star["reward"], 1.15 * star["reward"])
    near.set_title("the same, near the optimum", fontsize=9)
    fig.legend(*whole.get_legend_handles_labels(), fontsize=7.5, loc="outside lower center",
               ncols=3)
    figures.save(fig, path)


# ---- The command

def main(argv=None):
    start = time.time()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", help="the folder of a finished toy run of train.py")
    parser.add_argument("--samples", type=number(int, Settings.batch_size, 10_000_000),
                        default=Settings.samples,
                        help="responses generated in each policy learning; more of them come "
                             "closer to the optimum and take longer (default: %(default)s)")
    parser.add_argument("--device", metavar="{auto,cpu,cuda,mps}", type=device, default="cpu",
                        help="for a model this small the CPU is the fastest (default: cpu)")
    args = parser.parse_args(argv)
    run = Finished(args.dir, pick_device(args.device))
    asked = {"samples": args.samples, "beta": run.beta}
    learning = asdict(Settings(**asked))
    # older versions recorded the settings of all trainings in one file
    different = work.differences(run.folder / "rlhf" / "settings.json", learning)
    if different:
        raise SystemExit(f"{run.folder / 'rlhf'} was made with {different}: "
                         "remove that folder to begin anew")
    work.do(pieces(learning), [run.folder], run.device)

    comparison = compare(run) | {"settings": asked}
    print("\n" + table(comparison))
    plot_plane(comparison["rows"], run.ref_logps, run.folder / "rlhf.png")
    torch.manual_seed(run.seed)  # the samples below are the same every time
    models = {"sft": run.reference, "dpo": run.models["dpo"], "ppo": run.policy("ppo-human")}
    show.answers(models, run.tokenizer, run.held_out[2])
    comparison["seconds"] = time.time() - start
    write_json(comparison, run.folder / "rlhf.json")
    print(f"\nFigure: {run.folder / 'rlhf.png'}. Done in {comparison['seconds']:.0f} s.")


if __name__ == "__main__":
    command.run(main, again="The same command goes on with what is missing.")
