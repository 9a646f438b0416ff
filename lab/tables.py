"""Makes docs/results.json, the numbers that README.md and the pages in docs/ quote.

    python -m lab.tables     about ten minutes on 2 cores

It runs train.py for three seeds and collects the summaries. How much of its text plain DPO keeps
well-formed differs so much from run to run that it is measured for eight seeds. Runs are kept in
out/results and are not run again. `lab.remedies` compares the default objective with others.
"""
import argparse
import shutil
import sys

from lab.seeds import ROOT, SEEDS, train
from support.files import write_json

PLAIN_SEEDS = range(8)


def summaries(name, flags=(), seeds=SEEDS):
    """The summaries of train.py with these flags, one for each seed."""
    folder = ROOT / "out" / "results"
    return [train(folder / f"{name}-{seed}", "--seed", str(seed), *flags) for seed in seeds]


def main(argv=()):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    # Plain DPO is a stage of the default run: its numbers are the plain_* of these summaries.
    results = {"default": summaries("default")}
    for figure in ("frontier.png", "curves.png"):
        shutil.copy(ROOT / "out" / "results" / "default-0" / figure, ROOT / "docs" / figure)
    plain = summaries("plain", ["--stray-weight", "0"], PLAIN_SEEDS)
    results["plain_wellformed"] = [run["policy_wellformed"] for run in plain]
    write_json(results, ROOT / "docs" / "results.json")


if __name__ == "__main__":
    main(sys.argv[1:])
