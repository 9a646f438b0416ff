"""Systems that belong to DPO's family, each as a measured row.

    python -m lab.systems DIR [DIR ...]     DIR: finished toy runs of train.py, one for each seed

reference  another reference in Eq. 7, or none, over beta (2407.13709)
bmc        token weights, and losers edited towards their winners (2408.07471)
aihf       labels and demonstrations together, or one after the other (2406.06874), see lab/aihf.py
udrra      rewards, their differences, preferences or labels: one target (2502.03095)
mdpo       mirror descent beside PPO and REINFORCE++ (2005.09814), see lab/mdpo.py

Each row has the run's reference, pairs, learning rate and number of steps where nothing else is
said, and it is measured exactly on the held-out prompts. "Stray" is the weight of losses.stray_mass
beside the loss: 1, as in train.py. The tokens that it spares are those that the run's own reference
finds likely, whatever the reference in the loss. Results are kept in DIR/systems.
"""
import argparse
from functools import lru_cache
from pathlib import Path

import torch

import evaluate
import train
import world
from dpo import dpo_loss
from lab import aihf, credit, mdpo, work
from lab.finished import Finished
from lab.judges import by_text
from lab.more_losses import pra_loss, ra_loss, rda_loss
from lab.seeds import ROOT
from lab.systems_training import fit, known, likelihood_loss, true_values
from rlhf import Settings, learn
from support import checkpoints, command
from support.files import write_json
from support.statistics import mean_and_se

# ---- Measuring

@lru_cache(maxsize=None)
def exact_credit(run):
    """For the held-out prompts: the reference, the exact soft advantage of each token, and how
    often the reference writes the token, (P,N), (P,N,T), (P,N,T). prefix (N,T+1) comes last."""
    sequences = credit.toy_sequences()
    prefix, ref = credit.prefixes(sequences), world.normalise(run.ref_logps)
    exact = credit.advantages(ref, evaluate.held_out_rewards(), run.beta, prefix)
    lengths = torch.tensor([len(s) for s in sequences])  # (N,)
    inside = torch.arange(exact.size(-1)) < lengths[:, None]  # (N, T)
    return ref, exact, ref.exp().unsqueeze(-1) * inside, prefix


def correlation(a, b, weight):
    """The correlation of two tensors. weight: how often each entry counts. A float."""
    weight = weight / weight.sum()
    a, b = a - (weight * a).sum(), b - (weight * b).sum()
    spread = ((weight * a * a).sum() * (weight * b * b).sum()).sqrt()
    return ((weight * a * b).sum() / spread).item()


def measured(run, policy, beta=None):
    """A row: exact numbers of a GPT, means over the held-out prompts. beta: that of its loss, for
    J at this beta beside J at the run's."""
    r, ref = evaluate.held_out_rewards(), world.normalise(run.ref_logps)  # (P, N), (P, N)
    logps = evaluate.exact_logps(policy, run.held_out)  # (P, N)
    row = evaluate.measure(logps, run.ref_logps, run.beta)

    def of_optimum(beta):  # the best J is beta log Z, below Eq. 4
        best = beta * world.log_partition(ref, r, beta).mean().item()
        return (row["reward"] - beta * row["kl"]) / best

    _, exact, written, prefix = exact_credit(run)
    learned = (credit.token_logps(world.normalise(logps), prefix)
               - credit.token_logps(ref, prefix))  # (P, N, T)
    return {"reward": row["reward"], "kl": row["kl"], "of_optimum": of_optimum(run.beta),
            "of_own": of_optimum(beta or run.beta),
            "captured": evaluate.captured(row, run.ref_logps)[2],
            "wellformed": row["wellformed"], "objective_all": row["objective_all"],
            "credit": correlation(exact, learned, written)}


# ---- The pieces of work: each returns {row: its numbers}

def reference_row(run, folder, reference, beta, stray_weight=1.0):
    """DPO with another reference in the loss. The policy begins as the run's reference.

    itself: the run's reference. none: log-probabilities 0, a uniform reference. near: the run's
    DPO policy, trained at beta = 1. far: the policy of "itself" at beta = 0.1. likelihood: no
    preferences either, only the chosen responses. asked_kl is the KL of the policy that the loss
    is least for, from the run's reference.
    """
    pairs, ref_logps, asked = known(run), None, run.ref_logps  # asked (P, N)
    if reference == "none":
        ref_logps, asked = [torch.zeros(len(pairs.examples))] * 2, torch.zeros_like(asked)
    elif reference in ("near", "far"):
        model = run.models["dpo"]
        if reference == "far":
            file = run.folder / "systems" / "reference" / "itself-0.1" / "policy.pt"
            model = checkpoints.load_model(file, run.device)[0].eval()
        ref_logps = train.reference_logps(model, pairs.examples, 512)
        asked = evaluate.exact_logps(model, run.held_out)
    if (reference, beta) == ("itself", 1.0):  # train.py has trained it
        policy = run.models["dpo" if stray_weight else "plain"]
    else:
        loss = likelihood_loss if reference == "likelihood" else dpo_loss
        policy, _ = fit(run, folder, pairs, loss=loss, beta=beta, ref_logps=ref_logps,
                        stray_weight=stray_weight)
        checkpoints.save_model(policy, folder / "policy.pt")
    row = measured(run, policy, beta)
    if reference != "likelihood":
        star = world.optimal_policy(world.normalise(asked), evaluate.held_out_rewards(), beta)
        row["asked_kl"] = world.kl(star, world.normalise(run.ref_logps)).mean().item()
    name = reference if stray_weight else f"{reference}, plain"
    return {f"{name}, β = {beta:g}": row}


def bmc_row(run, folder, editor, delta, beta):
    """DPO on bridged pairs (editor), with token weights (delta), with both, or with neither."""
    pairs = known(run, editor)
    policy, _ = fit(run, folder, pairs, beta=beta, delta=delta)
    return {folder.name: measured(run, policy) | {"better": pairs.better}}


def aihf_row(run, folder, how, labels, demonstrations, expert):
    """Labels and demonstrations: how = "joint", "in turn", or "labels" alone."""
    texts = aihf.draw_demonstrations(run, expert, demonstrations)
    policies = aihf.policies(run, folder, how, known(run).first(labels), texts)
    said = f"{labels} labels, {demonstrations} demonstrations"
    said += " of the corpus" if expert == "corpus" else ""
    return {f"{said}: {name}": measured(run, policy) for name, policy in policies.items()}


def udrra_row(run, folder, loss, stray_weight):
    """One of the four losses at the run's beta. They have the same pairs, in the same order."""
    chosen, rejected, log_z = true_values(run)  # (n,) each
    true = {"chosen_true": chosen, "rejected_true": rejected}
    function, further = {
        "RA": (ra_loss, true | {"log_z": log_z}), "RDA": (rda_loss, true),
        "PRA": (pra_loss, {"preference": world.preference_prob(chosen, rejected)}),
        "DPO": (dpo_loss, {})}[loss]
    probes = {share: lambda policy: measured(run, policy)["of_optimum"] for share in (0.1, 0.3)}
    policy, found = fit(run, folder, known(run), loss=function, beta=run.beta,
                        stray_weight=stray_weight, further=further, probes=probes)
    return {folder.name: measured(run, policy) | {f"at_{100 * share:.0f}": value
                                                  for share, value in found.items()}}


def policy_row(run, folder, how, samples, **settings):
    """Policy learning with the true reward: PPO, REINFORCE++, or MDPO."""
    policy, score = run.new_policy(), by_text(world.true_reward)
    if how == "mdpo":
        mdpo.learn(policy, run.reference, score, run.prompt_ids, beta=run.beta, samples=samples,
                   seed=run.seed, **settings)
    else:
        learn(policy, run.reference, score, run.prompt_ids,
              Settings(beta=run.beta, samples=samples, **settings), run.seed)
    return {folder.name: measured(run, policy)}


BALANCES = ((500, 9_500), (5_000, 5_000), (9_500, 500))  # labels, demonstrations


def pieces():
    """The most important ones come first. So whoever stops early has these for all runs."""
    def one(name, function, needs=(), **settings):
        return work.Piece(f"systems/{name}", function, settings, needs)

    def reference(kind, beta, stray_weight=1.0):
        name = kind if stray_weight else "plain"
        return one(f"reference/{name}-{beta:g}", reference_row, reference=kind, beta=beta,
                   needs=("systems/reference/itself-0.1",) if kind == "far" else (),
                   stray_weight=stray_weight)

    def udrra(loss, stray_weight=1.0):
        return one(f"udrra/{loss}" + ("" if stray_weight else " plain"), udrra_row, loss=loss,
                   stray_weight=stray_weight)

    def bmc(name, editor=None, delta=None, beta=1.0):
        return one(f"bmc/{name}", bmc_row, editor=editor, delta=delta, beta=beta)

    def policy(name, how="rlhf", **settings):
        return one(f"mdpo/{name}", policy_row, how=how, samples=Settings.samples, **settings)

    def demonstrations(labels, shown, how, expert="optimum"):
        name = f"{labels} labels, {how}" + ("" if expert == "optimum" else f", {expert}")
        return one(f"aihf/{name}", aihf_row, how=how, labels=labels, demonstrations=shown,
                   expert=expert)

    few, even, many = BALANCES
    first = [reference("itself", 1.0), reference("itself", 1.0, 0.0), reference("itself", 0.1)]
    first += [reference("none", 1.0), reference("near", 1.0), udrra("RA"), udrra("DPO")]
    first += [bmc("weights, beta 0.4", delta=2.0, beta=0.4),
              bmc("bridged by a judge", editor="judge")]
    first += [policy("MDPO", how="mdpo", t=1.0), policy("REINFORCE++", critic=False)]
    first += [demonstrations(*few, how) for how in ("joint", "in turn", "labels")]
    then = [reference("far", 1.0), udrra("RDA")]
    then += [demonstrations(*many, how) for how in ("joint", "in turn", "labels")]
    then += [udrra("PRA"), reference("itself", 0.03), reference("itself", 0.25),
             bmc("bridged by chance", editor="chance"),
             bmc("bridged by a judge, weights, beta 0.4", editor="judge", delta=2.0, beta=0.4)]
    then += [demonstrations(*even, how) for how in ("joint", "in turn", "labels")]
    then += [policy("PPO"), bmc("weights, beta 1", delta=2.0), udrra("RA", 0.0)]
    then += [reference("itself", beta) for beta in (0.5, 4.0, 2.0, 8.0)]
    then += [policy("REINFORCE++ without clip", critic=False, clip=None),
             demonstrations(*even, "joint", "corpus"), reference("near", 4.0),
             reference("far", 4.0), reference("itself", 0.03, 0.0), reference("none", 0.25),
             reference("likelihood", 1.0), policy("MDPO, t 3", how="mdpo", t=3.0)]
    return first + then


# ---- What came out

def gather(folders):
    """{group: {row: {column: a number for each run}}}, of the pieces that are done on every
    run. The rows are sorted by name, so that beta rises."""
    out = {}
    for piece in pieces():
        results = [work.result(folder, piece.name) for folder in folders]
        if None not in results:
            group = out.setdefault(piece.name.split("/")[1], {})
            for row, columns in results[0].items():
                group[row] = {column: [result[row][column] for result in results]
                              for column in columns}
    return {group: dict(sorted(rows.items())) for group, rows in out.items()}


COLUMNS = {"reward": ("true reward", 3, 1), "kl": ("KL, nats", 3, 1),
           "of_optimum": ("J/J\\*, %", 1, 100), "captured": ("share, %", 1, 100),
           "wellformed": ("well-formed, %", 1, 100), "credit": ("credit", 3, 1)}
DEFAULT = "itself, β = 1"
MORE = {"reference": {"asked_kl": ("KL asked for", 3, 1), "of_own": ("J/J\\* at its β, %", 1, 100)},
        "udrra": {"at_10": ("J/J\\* at 10 %", 1, 100), "at_30": ("at 30 %", 1, 100)},
        "bmc": {"better": ("edits that are better, %", 1, 100)}}


def table_of(found, group):
    """A group as a table in Markdown: means and standard errors over the runs, a list of lines."""
    columns = COLUMNS | MORE.get(group, {})  # a column that a row lacks is left empty
    rows = {} if group == "reference" else {"DPO (the default run)": found["reference"][DEFAULT]}
    rows = rows | found[group]

    def cell(values, digits, scale):
        if not values:
            return ""
        mean, error = mean_and_se([scale * value for value in values])
        return f"{mean:.{digits}f} ± {error:.{digits}f}"

    lines = ["| | " + " | ".join(title for title, *_ in columns.values()) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [cell(row.get(column, []), *how) for column, (_, *how) in columns.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", metavar="DIR", type=Path, nargs="+",
                        help="finished toy runs of train.py, one for each seed")
    parser.add_argument("--done", action="store_true",
                        help="train nothing more: only show or record what is done")
    parser.add_argument("--record", action="store_true",
                        help="write what was found to docs/systems.json, which a page quotes")
    args = parser.parse_args(argv)
    runs = [Finished(folder) for folder in args.dirs]
    for run in runs:
        if (run.beta, run.flags["stray_weight"]) != (1, 1):
            raise SystemExit(f"{run.folder} has beta = {run.beta:g} and stray weight = "
                             f"{run.flags['stray_weight']:g}: the settings here are made for 1")
    if not args.done:
        work.do(pieces(), args.dirs)
    found = gather(args.dirs)
    if args.record:
        write_json({"seeds": [run.seed for run in runs], "rows": found},
                   ROOT / "docs" / "systems.json")
    for group in found:
        print("\n" + "\n".join([group, "", *table_of(found, group)]))


if __name__ == "__main__":
    command.run(main, again="The same command goes on with what is missing.")
