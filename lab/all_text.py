"""J over all text, estimated from samples: `python -m lab.all_text out/toy`.

`evaluate.measure` counts all ill-formed text as one outcome. So its KL is at most the KL over all
text, and its J, all text, is at least the true one. Here the KL over all text is estimated.
"""
import argparse
from pathlib import Path

import torch

import evaluate
import world
from support import command
from support.own_data import sample_metrics
from support.run import load_toy_run

SAMPLES = 500  # for each prompt; with four times as many the standard error is half as large


def bound_and_estimate(policy, reference, tokenizer, samples):
    """Means over the held-out prompts: E[r*] over all text, the least KL that is possible, and the
    estimate of the KL from so many samples a prompt, with its standard error.

    Text that does not end within the model's block is cut there, and counts as a text.
    """
    held_out = world.prompts()[1]
    rewards = evaluate.held_out_rewards()  # (P, N)
    p, r = world.with_ill_formed(evaluate.exact_logps(policy, held_out), rewards)  # (P, N+1)
    ref, _ = world.with_ill_formed(evaluate.exact_logps(reference, held_out), rewards)
    room = policy.config.block_size - max(len(tokenizer.encode_ordinary(x)) for x in held_out)
    sampled = sample_metrics(policy, reference, held_out * samples, tokenizer, room, "cpu")
    return world.expected(p, r).mean().item(), world.kl(p, ref).mean().item(), *sampled["kl"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, nargs="+", help="folders of finished toy runs")
    args = parser.parse_args(argv)
    runs = [load_toy_run(folder) for folder in args.dir]  # all of them, before half a minute each
    print(f"{'run':<8}{'policy':<8}{'KL, at least':>13}{'KL, estimated':>18}{'J, at most':>12}"
          f"{'J, estimated':>18}")
    for folder, (flags, tokenizer, models) in zip(args.dir, runs):
        torch.manual_seed(flags["seed"])
        beta, reference = flags["beta"], models.pop("sft")
        for name, policy in models.items():
            reward, least, kl, error = bound_and_estimate(policy, reference, tokenizer, SAMPLES)
            print(f"{folder.name:<7} {name:<8}{least:>13.3f}{kl:>10.3f} ± {error:.3f}"
                  f"{reward - beta * least:>12.3f}{reward - beta * kl:>10.3f} "
                  f"± {beta * error:.3f}")


if __name__ == "__main__":
    command.run(main, again="The same command starts again.")
