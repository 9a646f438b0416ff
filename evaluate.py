"""How good is a policy? On the toy world the answer is exact, over all 2,304 responses.

    python evaluate.py DIR                 the closing table, samples and figures of a finished run
    python evaluate.py DIR --prompt TEXT   what the reference and the policies answer to TEXT
"""
import argparse
import math
from functools import lru_cache
from pathlib import Path

import torch

import world
from support import command, own_data, show, toy_data
from support.files import read_json, write_json
from support.run import load_run
from support.trie import exact_logps

# ---- Exact measurements

@lru_cache(maxsize=1)
def held_out_rewards():
    """The true reward of every response to every held-out prompt, (P, N) float64."""
    return world.rewards(world.prompts()[1], world.responses())


def measure(logps, ref_logps, beta, r=None):
    """All that the closing table says of a policy, means over prompts, a dict of floats.

    logps, ref_logps (P,N): from `exact_logps`. r (P,N): the rewards, by default true_reward's.
    reward, kl and objective (J = E[r*] - beta KL) are over well-formed text, of policy and
    reference alike, so that they compare with the frontier. objective_all and win_rate count
    ill-formed text at its low reward. objective_all is an upper bound of J over all text, see
    `world.with_ill_formed`. wellformed is the policy's mass on well-formed text.
    """
    r = held_out_rewards() if r is None else r
    p, ref = world.normalise(logps), world.normalise(ref_logps)  # (P, N)
    p_all, r_all = world.with_ill_formed(logps, r)  # (P, N+1)
    ref_all, _ = world.with_ill_formed(ref_logps, r)  # (P, N+1)
    objective_all = world.expected(p_all, r_all) - beta * world.kl(p_all, ref_all)  # (P,)
    reward, kl = world.expected(p, r).mean().item(), world.kl(p, ref).mean().item()
    return {"reward": reward, "kl": kl,
            "win_rate": world.win_rate(p_all, ref_all, r_all).mean().item(),
            "wellformed": logps.exp().sum(-1).mean().item(),
            "objective_all": objective_all.mean().item(),
            "objective": reward - beta * kl}


def optimum(ref_logps, beta, at_beta):
    """`measure` of pi* for the leash beta. The objectives are computed with at_beta, the run's."""
    star = world.optimal_policy(world.normalise(ref_logps), held_out_rewards(), beta)
    return measure(star, ref_logps, at_beta)


def captured(row, ref_logps):
    """How close a measured policy is to the best one at its KL: (beta, reward) of that best
    policy, and the share of its gain over the reference that the row reaches (nan at KL 0)."""
    r, ref = held_out_rewards(), world.normalise(ref_logps)
    start = world.expected(ref, r).mean().item()
    beta = world.beta_at_kl(ref, r, row["kl"])
    best = world.expected(world.optimal_policy(ref, r, beta), r).mean().item()
    if row["kl"] < 1e-9:  # there is nothing to gain
        return beta, best, math.nan
    return beta, best, (row["reward"] - start) / (best - start)


# ---- The summary of a toy run

def toy_summary(models, beta, annotator="human"):
    """models: {"sft": GPT, "dpo": GPT, perhaps "plain": GPT} -> a dict of plain numbers."""
    held_out = world.prompts()[1]
    logps = {name: exact_logps(model, held_out) for name, model in models.items()}
    ref = logps.pop("sft")  # (P, N)
    rows = {name: measure(policy, ref, beta) for name, policy in logps.items()}
    beta_same_kl, best, share = captured(rows["dpo"], ref)
    rows["reference"] = measure(ref, ref, beta)
    rows["same_kl"] = optimum(ref, beta_same_kl, beta) | {"reward": best}
    rows["same_beta"] = optimum(ref, beta, beta)
    # With ill-formed text as one more outcome, Eq. 4's optimum is beta log Z with one more term.
    log_z = world.log_partition(*world.with_ill_formed(ref, held_out_rewards()), beta)  # (P,)
    summary = {"beta": beta, "captured": share, "optimal_beta_same_kl": beta_same_kl,
               "objective_all_optimal": beta * log_z.mean().item(),
               "label_ceiling": toy_data.ceiling(annotator),
               "ref_kl_from_grammar": world.kl(world.grammar_logps(held_out), ref).mean().item()}
    if "plain" in rows:
        summary["plain_captured"] = captured(rows["plain"], ref)[2]
    for name, row in rows.items():
        for column, value in row.items():
            summary[show.summary_key(name, column)] = value
    return summary


# ---- A whole run

def report(folder, device="cpu"):
    """Measure a finished run, print the table and samples, and return the summary."""
    flags, tokenizer, models = load_run(folder, device)
    torch.manual_seed(flags["seed"])  # the samples below are the same every time
    if flags["data"] is None:
        summary = toy_summary(models, flags["beta"], flags["annotator"])
        prompts, n = world.prompts()[1][::3], 3
        print("\n" + show.toy_table(summary))
    else:
        summary, prompts = own_data.measure(models["dpo"], models["sft"], flags, tokenizer, device)
        prompts, n = prompts[:3], 1
        print("\n" + own_data.table(summary))
    for prompt in prompts:
        show.answers(models, tokenizer, prompt, n)
    print(f"\nYour own prompt: python evaluate.py {folder} --prompt TEXT")
    return summary | {"flags": flags}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="the folder of a finished train.py run")
    parser.add_argument("--prompt", help="answer this prompt with every model, side by side")
    args = parser.parse_args(argv)
    if args.prompt is not None:
        _, tokenizer, models = load_run(args.dir)
        show.answers(models, tokenizer, args.prompt)
        return
    file = args.dir / "summary.json"
    before = read_json(file) if file.exists() else {}
    summary = report(args.dir)
    write_json(summary | {"seconds": before.get("seconds")}, file)
    from support import figures  # only here: it chooses matplotlib's backend
    figures.draw_run(args.dir, summary)


if __name__ == "__main__":
    command.run(main, again="The same command does it again.")
