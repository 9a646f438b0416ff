"""The measurements. On the toy world every figure is exact: each held-out prompt's 2,304 responses are all scored.
On a user's data, where nobody can list the responses, figures come from held-out pairs and from samples.

    python evaluate.py DIR                  the closing table, samples side by side and the figures of a finished train.py run
    python evaluate.py DIR --prompt TEXT    what the reference and the policy answer to TEXT
"""
import argparse
import hashlib
import json
import math
import os
import sys
import textwrap
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

import data
import world
from dpo import dpo_loss, pair_logps
from model import load_model

# Okabe and Ito's colours, told apart by colour-blind readers and in grey; the same colour for the same thing everywhere
COLOURS = {"reference": "#000000", "dpo": "#0072B2", "plain": "#D55E00", "optimum": "#009E73", "rejected": "#CC79A7",
           "limit": "#999999"}
NAMES = {"dpo": "DPO", "plain": "plain DPO", "ppo": "PPO"}


# --------------------------------------------------------------------------------------------------------------------
# The toy world, exactly

@lru_cache(maxsize=1)
def toy_trie():
    tokenizer = data.get_tokenizer("toy")
    return world.Trie([tokenizer.encode_ordinary(y) + [tokenizer.eot_token] for y in world.responses()])


def exact_logps(model, prompts):
    """log pi(y|x) of every well-formed response to every prompt: (P, N) float64."""
    tokenizer = data.get_tokenizer("toy")
    return torch.stack([toy_trie().logps(model, tokenizer.encode_ordinary(x)) for x in prompts])


@lru_cache(maxsize=1)
def held_out_rewards():
    """True rewards of all responses to the held-out prompts, (P, N) float64."""
    return world.rewards(world.prompts()[1], world.responses())


@lru_cache(maxsize=None)
def annotator_ceiling(annotator):
    """How often the annotator's own score agrees with its Bradley-Terry labels, over pairs of the grammar for the train
    prompts: the accuracy that no model can beat except by learning the labels' noise."""
    train, _ = world.prompts()
    scores = world.rewards(train, world.responses(), world.ANNOTATORS[annotator])
    return world.label_ceiling(world.grammar_logps(train), scores).mean().item()


def measure(logps, ref_logps, beta, r=None):
    """Everything the closing table says of a policy, averaged over prompts; logps, ref_logps: `exact_logps`; r: the true rewards,
    those of the held-out prompts unless others are given.

    reward, kl, objective (J = E[r*] - beta KL): of the policy given that its text is well-formed, against the reference
    given the same, so that they compare with the frontier. objective_all, win_rate: ill-formed text counted, at its low
    reward. wellformed: the policy's mass on well-formed text.
    """
    r = held_out_rewards() if r is None else r
    p, ref = world.normalise(logps), world.normalise(ref_logps)
    p_all, r_all = world.with_ill_formed(logps, r)
    ref_all, _ = world.with_ill_formed(ref_logps, r)
    row = {
        "reward": world.expected(p, r).mean().item(),
        "kl": world.kl(p, ref).mean().item(),
        "win_rate": world.win_rate(p_all, ref_all, r_all).mean().item(),
        "wellformed": logps.exp().sum(-1).mean().item(),
        "objective_all": (world.expected(p_all, r_all) - beta * world.kl(p_all, ref_all)).mean().item(),
    }
    return row | {"objective": row["reward"] - beta * row["kl"]}


def optimum(ref_logps, beta, at_beta):
    """`measure` of pi* for the reward and leash beta; objectives are reckoned with at_beta, the run's own. pi* is exact and
    well-formed; it reshapes the reference's well-formed text."""
    star = world.optimal_policy(world.normalise(ref_logps), held_out_rewards(), beta)
    return measure(star, ref_logps, at_beta)


def captured(row, ref_logps):
    """(beta, reward) of the optimum at the row's KL, and the share of its gain over the reference that the row reaches (nan
    for a policy that has not left the reference)."""
    r, ref = held_out_rewards(), world.normalise(ref_logps)
    start = world.expected(ref, r).mean().item()
    beta = world.beta_at_kl(ref, r, row["kl"])
    best = world.expected(world.optimal_policy(ref, r, beta), r).mean().item()
    return beta, best, (row["reward"] - start) / (best - start) if best > start + 1e-9 else math.nan


def toy_summary(models, beta, annotator="human"):
    """models: {"sft": GPT, "dpo": GPT, perhaps "plain": GPT} -> the summary of a toy run, a dict of plain numbers."""
    _, held_out = world.prompts()
    logps = {name: exact_logps(model, held_out) for name, model in models.items()}
    ref, r = logps["sft"], held_out_rewards()
    grammar = world.grammar_logps(held_out)
    reference, policy = measure(ref, ref, beta), measure(logps["dpo"], ref, beta)
    same_kl_beta, same_kl_reward, share = captured(policy, ref)
    same_kl, same_beta = optimum(ref, same_kl_beta, beta), optimum(ref, beta, beta)
    # with ill-formed text as an outcome of its own, Eq. 4's optimum is beta log Z over one more term
    objective_all_optimal = beta * world.log_partition(*world.with_ill_formed(ref, r), beta).mean().item()
    summary = {
        "beta": beta,
        "ref_reward": reference["reward"], "ref_wellformed": reference["wellformed"],
        "ref_kl_from_grammar": world.kl(grammar, ref).mean().item(),
        "policy_reward": policy["reward"], "policy_kl": policy["kl"], "policy_wellformed": policy["wellformed"],
        "optimal_reward_same_kl": same_kl_reward, "optimal_beta_same_kl": same_kl_beta, "captured": share,
        "optimal_reward_same_beta": same_beta["reward"], "optimal_kl_same_beta": same_beta["kl"],
        "objective": policy["objective"], "objective_optimal": same_beta["objective"],
        "objective_all": policy["objective_all"], "objective_all_optimal": objective_all_optimal,
        "win_rate": policy["win_rate"], "label_ceiling": annotator_ceiling(annotator),
        "rows": {"reference": reference, "dpo": policy, "optimum_same_kl": same_kl, "optimum_same_beta": same_beta},
    }
    if "plain" in logps:
        plain = measure(logps["plain"], ref, beta)
        summary["rows"]["plain"] = plain
        summary["plain_captured"] = captured(plain, ref)[2]
    return summary


def toy_table(s):
    """The closing table of a summary, text. Rows: policies; every column is exact and a mean over held-out prompts."""
    rows = [("reference (SFT)", s["rows"]["reference"])]
    if "plain" in s["rows"]:
        rows.append(("plain DPO (Eq. 7 alone)", s["rows"]["plain"]))
    rows += [("DPO", s["rows"]["dpo"]), ("optimum at DPO's KL", s["rows"]["optimum_same_kl"]),
             (f"optimum at beta = {s['beta']:g}", s["rows"]["optimum_same_beta"])]
    lines = [f"{'held-out prompts, exact':<26}{'true reward':>12}{'KL, nats':>10}{'J':>8}{'win rate':>10}"
             f"{'well-formed':>13}{'J, all text':>13}"]
    for name, r in rows:
        lines.append(f"{name:<26}{r['reward']:>12.3f}{r['kl']:>10.3f}{r['objective']:>8.3f}{r['win_rate']:>10.1%}"
                     f"{r['wellformed']:>13.1%}{r['objective_all']:>13.3f}")
    lines += ["", "true reward, KL to the reference, J = E[r*] - beta KL: over well-formed text. win rate (against a reference",
              f"sample, ties 1/2) and \"J, all text\" count ill-formed text at its reward of {world.ILL_FORMED_REWARD:g}.",
              "",
              f"DPO reaches {s['captured']:.1%} of the reward that is possible at its KL, and J is "
              f"{s['objective'] / s['objective_optimal']:.1%} of the optimum ({s['objective_all'] / s['objective_all_optimal']:.1%}"
              " with ill-formed text)."]
    if "plain" in s["rows"]:
        lines.append(f"Plain DPO reaches {s['plain_captured']:.1%} of what is possible with its well-formed text; "
                     f"{1 - s['rows']['plain']['wellformed']:.1%} of its text is ill-formed.")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# A user's data: held-out pairs and samples

@torch.no_grad()
def held_out_metrics(policy, reference, examples, loss_args, batch_size, device):
    """Loss, accuracy (ties 1/2) and rewards on held-out pairs, means with standard errors: {name: (mean, se)}."""
    columns = {"loss": [], "accuracy": [], "chosen_reward": [], "rejected_reward": [], "margin": []}
    for i in range(0, len(examples), batch_size):
        batch = {k: v.to(device) for k, v in data.collate(examples[i:i + batch_size]).items()}
        losses, chosen, rejected = dpo_loss(*pair_logps(policy, batch), *pair_logps(reference, batch), **loss_args)
        for name, value in zip(columns, (losses, ((chosen > rejected) + 0.5 * (chosen == rejected)), chosen, rejected,
                                         chosen - rejected)):
            columns[name].append(value.float().cpu())
    return {name: mean_and_se(torch.cat(values)) for name, values in columns.items()}


@torch.no_grad()
def sampled_metrics(policy, reference, prompts, tokenizer, max_new_tokens, device):
    """From one sample a prompt: KL(policy || reference) in nats a response, tokens a response, and the share that ended in
    EOS. {name: (mean, se)}. The KL is unbiased and never negative: at every token of a sample, the KL between the two
    distributions over the next token is summed exactly, and the sums are averaged over samples."""
    columns = {"kl": [], "tokens": [], "ended": []}
    for i in tqdm(range(0, len(prompts), 8), desc="sample", unit="batch", dynamic_ncols=True):
        ids = [tokenizer.encode_ordinary(x) for x in prompts[i:i + 8]]
        responses = policy.generate(ids, max_new_tokens, eos_id=tokenizer.eot_token)
        tokens, mask = (t.to(device) for t in data.pad(ids, responses))
        p, q = (torch.log_softmax(m(tokens)[:, :-1].float(), -1) for m in (policy, reference))        # (B, T-1, V)
        columns["kl"] += ((p.exp() * (p - q)).sum(-1) * mask[:, 1:]).sum(-1).tolist()
        columns["tokens"] += [float(len(r)) for r in responses]
        columns["ended"] += [float(r[-1] == tokenizer.eot_token) for r in responses]
    return {name: mean_and_se(torch.tensor(values)) for name, values in columns.items()}


def mean_and_se(values):
    """Mean and standard error of a 1-D tensor; the error of a single value is unknown, nan."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def data_table(s):
    lines = [f"{'held out: ' + str(s['held_out_pairs']) + ' pairs':<44}{'mean':>10}{'+- SE':>10}   compare with"]
    against = {"loss": f"ln 2 = {math.log(2):.4f} at the start", "accuracy": "50% by chance", "margin": "0 at the start",
               "chosen_reward": "0 at the start", "rejected_reward": "0 at the start", "kl": "0 at the start"}
    names = {"accuracy": "preference accuracy (by implicit reward)", "loss": "DPO loss, nats", "margin": "reward margin",
             "chosen_reward": "implicit reward of chosen", "rejected_reward": "implicit reward of rejected",
             "kl": "KL(policy || reference), nats, sampled", "tokens": "tokens a sampled response", "ended": "share that ended in EOS"}
    for key, name in names.items():
        mean, se = s[key]
        lines.append(f"{name:<44}{mean:>10.3f}{se:>10.3f}   {against.get(key, '')}".rstrip())
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# Text side by side

def side_by_side(columns, width=46):
    """columns: [(heading, [text, ...]), ...] -> the texts beside each other, wrapped, whitespace made visible as spaces."""
    wrap = lambda text: textwrap.wrap(" ".join(text.split()) or "(empty)", width - 2) or [""]
    lines = ["".join(f"{heading:<{width}}" for heading, _ in columns).rstrip(), "-" * (width * len(columns) - 2)]
    for texts in zip(*(texts for _, texts in columns)):
        wrapped = [wrap(t) for t in texts]
        for i in range(max(map(len, wrapped))):
            lines.append("".join(f"{w[i] if i < len(w) else '':<{width}}" for w in wrapped).rstrip())
    return "\n".join(lines)


def answers(model, tokenizer, prompt, n, temperature=1.0, max_new_tokens=64):
    """n sampled answers to a prompt, texts; "..." marks one that did not end."""
    ids = tokenizer.encode_ordinary(prompt)
    room = model.config.block_size - len(ids)
    if not ids or room < 1:
        raise SystemExit(f"--prompt has {len(ids)} tokens; this model reads 1 to {model.config.block_size - 1}")
    eos = tokenizer.eot_token
    out = model.generate([ids] * n, min(max_new_tokens, room), temperature=temperature, eos_id=eos)
    return [tokenizer.decode(r[:-1]) if r[-1] == eos else tokenizer.decode(r) + " ..." for r in out]


def show_answers(models, tokenizer, prompt, n=3):
    """Print n answers of the reference and of each policy to one prompt, on the toy world with their true rewards."""
    try:
        world.true_reward(prompt, "")
        worth = lambda text: f"{world.true_reward(prompt, text):+.1f} {'' if world.parse(text) else 'ill-formed:'}{text}"
        reward = ", with their true rewards"
    except ValueError:
        worth, reward = str, ""
    print(f"\n{prompt!r}{reward}")
    names = {"sft": "reference", **NAMES}
    print(side_by_side([(names[k], [worth(t) for t in answers(m, tokenizer, prompt, n)]) for k, m in models.items()]))


# --------------------------------------------------------------------------------------------------------------------
# Figures

def plotting():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
                         "grid.color": "#E6E6E6", "legend.frameon": False, "figure.dpi": 150})
    return plt


def save_figure(fig, path):
    beside = Path(path).with_name("writing-" + Path(path).name)
    fig.savefig(beside, bbox_inches="tight")
    os.replace(beside, path)


def plot_curves(records, path, ceiling=None):
    """The training curves of a run's metrics.jsonl records."""
    plt = plotting()
    stages = [s for s in ("dpo", "plain") if any(r["stage"] == s and "loss" in r for r in records)]
    of = lambda stage, key: zip(*[(r["step"], r[key]) for r in records if r["stage"] == stage and key in r])
    exact = any("wellformed" in r for r in records)
    fig, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    loss, accuracy, rewards, logps, left, right = axes.flat

    for ax, title in ((loss, "DPO loss, nats"), (accuracy, "share of pairs ranked as labelled"),
                      (rewards, "implicit reward, $\\beta\\,\\log(\\pi/\\pi_{ref})$"),
                      (logps, "log-probability of a response, nats")):
        ax.set_title(title, fontsize=9)
    for stage in stages:
        colour, name = COLOURS[stage], NAMES[stage]
        loss.plot(*of(stage, "loss"), color=colour, label=name)
        accuracy.plot(*of(stage, "rewards/accuracies"), color=colour, label=name)
        for key, style in (("chosen", "-"), ("rejected", ":")):
            rewards.plot(*of(stage, f"rewards/{key}"), style, color=colour, label=f"{name}, {key}")
            logps.plot(*of(stage, f"logps/{key}"), style, color=colour, label=f"{name}, {key}")
    loss.axhline(math.log(2), color=COLOURS["limit"], ls="--", label="ln 2: policy = reference")
    if ceiling is not None:
        accuracy.axhline(ceiling, color=COLOURS["limit"], ls="--", label="ceiling: the annotator's own score")
    if exact:
        for stage in stages:
            left.plot(*of(stage, "wellformed"), "o-", ms=3, color=COLOURS[stage], label=NAMES[stage])
            right.plot(*of(stage, "objective_all"), "o-", ms=3, color=COLOURS[stage], label=NAMES[stage])
        left.set_title("mass on well-formed text (held out, exact)", fontsize=9)
        left.set_ylim(0, 1.03)
        right.set_title("J over all text, units of reward (held out, exact)", fontsize=9)
    else:
        left.plot(*of("sft", "loss"), color=COLOURS["reference"], label="SFT")
        left.set_title("SFT loss, nats a response", fontsize=9)
        for stage in stages:
            right.plot(*of(stage, "grad_norm"), color=COLOURS[stage], label=NAMES[stage])
        right.set_title("gradient norm before clipping", fontsize=9)
    for ax in (rewards, logps):                          # four curves fill the panel: the legend gets room of its own
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.3 * (high - low))
        ax.legend(fontsize=7, loc="upper right", ncols=len(stages))
    for ax in axes.flat:
        ax.set_xlabel("step")
        if ax not in (rewards, logps) and ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    save_figure(fig, path)
    plt.close(fig)


def plot_frontier(records, ref_logps, summary, path):
    """The reward-KL plane: the exact frontier, the reference, each policy's path through training, pi* at the run's beta."""
    plt = plotting()
    r, ref = held_out_rewards(), world.normalise(ref_logps)
    paths = {s: [(e["kl"], e["reward"], e["wellformed"]) for e in records if e["stage"] == s and "wellformed" in e]
             for s in ("dpo", "plain")}
    far = max([x for p in paths.values() for x, _, _ in p] + [summary["optimal_kl_same_beta"]]) * 1.25
    kl, reward = world.frontier(ref, r, torch.logspace(2, math.log10(world.beta_at_kl(ref, r, far)), 80).tolist())
    fig, ax = plt.subplots(figsize=(6.2, 4.2), layout="constrained")
    ax.plot(kl, reward, color=COLOURS["optimum"], lw=2, label="frontier: no policy is above it (exact)")
    ax.fill_between(kl, reward, max(reward) * 1.08, color=COLOURS["optimum"], alpha=0.08, lw=0)
    for stage, marker in (("plain", "s"), ("dpo", "o")):
        if paths[stage]:
            x, y, w = zip(*paths[stage])
            ax.plot(x, y, marker + "-", ms=4, lw=1, color=COLOURS[stage],
                    label=f"{NAMES[stage]} through training; at the end {w[-1]:.0%} of its text is well-formed")
    ax.plot(0, summary["ref_reward"], "D", color=COLOURS["reference"], label="reference (SFT)")
    ax.plot(summary["optimal_kl_same_beta"], summary["optimal_reward_same_beta"], "*", ms=14, color=COLOURS["optimum"],
            label=f"$\\pi^*$ at $\\beta$ = {summary['beta']:g}, DPO's target")
    ax.set_xlabel("KL(policy || reference), nats a response")
    ax.set_ylabel("true reward E[r*]")
    ax.set_ylim(top=max(reward) * 1.08)
    ax.legend(fontsize=7.5, loc="lower right")
    ax.set_title("Held-out prompts, well-formed text, exact", fontsize=9)
    save_figure(fig, path)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------------------------
# A whole run

def write_json(value, path):
    beside = Path(path).with_name(Path(path).name + ".writing")
    beside.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(beside, path)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()] if Path(path).exists() else []


def load_run(out_dir, device="cpu"):
    """(flags, tokenizer, models) of a train.py run: its flags as a dict, and {"sft": .., "dpo": .., perhaps "plain": ..}."""
    out_dir = Path(out_dir)
    flags_file = out_dir / "flags.json"
    if not flags_file.exists() or not (out_dir / "dpo.pt").exists():
        raise SystemExit(f"{out_dir} holds no finished run (no {'dpo.pt' if flags_file.exists() else 'flags.json'}); make one "
                         f"with: python train.py --out-dir {out_dir}")
    flags = json.loads(flags_file.read_text(encoding="utf-8"))
    models = {}
    for name in ("sft", "plain", "dpo"):
        if (out_dir / f"{name}.pt").exists():
            models[name], facts = load_model(out_dir / f"{name}.pt", device)
            models[name].eval()
            if name != "sft" and facts["reference"] != fingerprint(models["sft"]):
                raise SystemExit(f"{out_dir / name}.pt was trained against another reference than {out_dir / 'sft.pt'}: "
                                 "log-ratios of the two mean nothing")
    return flags, data.get_tokenizer(flags["tokenizer"]), models


def sha256(path):
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise data.DataError(f"{path}: cannot be read ({error})") from error


def fingerprint(model):
    """A short string that differs between models whose weights differ."""
    return " ".join(f"{p.detach().cpu().double().sum().item():.9g}" for p in model.parameters())


def report(out_dir, device="cpu"):
    """Measure a finished run, print the table and samples, write summary.json and the figures. Returns the summary."""
    out_dir = Path(out_dir)
    flags, tokenizer, models = load_run(out_dir, device)
    records = read_jsonl(out_dir / "metrics.jsonl")
    torch.manual_seed(flags["seed"])                     # the samples below are the same every time
    if flags["data"] is None:
        summary = toy_summary(models, flags["beta"], flags["annotator"])
        prompts = world.prompts()[1][::3]
        print("\n" + toy_table(summary))
        plot_frontier(records, exact_logps(models["sft"], world.prompts()[1]), summary, out_dir / "frontier.png")
        figures = "curves.png, frontier.png"
    else:
        if sha256(flags["data"]) != flags["data_sha256"]:
            raise data.DataError(f"{flags['data']} has changed since {out_dir} was trained on it: what is held out is no longer "
                                 "known")
        _, held_out, _ = data.load_split(flags["data"], flags["seed"])
        block = models["sft"].config.block_size
        examples, _ = data.tokenize(held_out, tokenizer, block)
        loss_args = {"beta": flags["beta"], "loss_type": flags["loss"], "label_smoothing": flags["label_smoothing"]}
        prompts = sorted({p.prompt for p in held_out if len(tokenizer.encode_ordinary(p.prompt)) < block * 3 // 4})[:64]
        room = block - max(len(tokenizer.encode_ordinary(p)) for p in prompts)
        summary = {"held_out_pairs": len(examples), "beta": flags["beta"],
                   **held_out_metrics(models["dpo"], models["sft"], examples, loss_args, 16, device),
                   **sampled_metrics(models["dpo"], models["sft"], prompts, tokenizer, room, device)}
        prompts = prompts[:3]
        print("\n" + data_table(summary))
        figures = "curves.png"
    summary["flags"] = flags
    plot_curves(records, out_dir / "curves.png", summary.get("label_ceiling"))
    for prompt in prompts:
        show_answers(models, tokenizer, prompt, n=3 if flags["data"] is None else 1)
    print(f"\nFigures in {out_dir}: {figures}. Your own prompt: python evaluate.py {out_dir} --prompt TEXT")
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", help="the folder of a finished train.py run (its --out-dir)")
    parser.add_argument("--prompt", help="answer this prompt with the reference and the policy, side by side")
    args = parser.parse_args()
    if args.prompt is not None:
        _, tokenizer, models = load_run(args.dir)
        show_answers(models, tokenizer, args.prompt)
        return
    old = Path(args.dir) / "summary.json"
    seconds = json.loads(old.read_text(encoding="utf-8")).get("seconds") if old.exists() else None
    write_json(report(args.dir) | {"seconds": seconds}, old)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")       # a sample may hold a character that the terminal lacks
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"error: {error}")
