"""Makes docs/results.json, the numbers that README.md and the pages in docs/ quote.

    python -m lab.tables     about 25 minutes on 2 cores

It runs train.py for three seeds, with the default objective and with other remedies, and collects
the summaries. How much of its text plain DPO keeps well-formed differs so much from run to run
that it is measured for eight seeds. Runs are kept in out/results and are not run again.
"""
import argparse
import shutil
import sys

from lab.seeds import ROOT, SEEDS, train
from support.files import write_json

# Plain DPO is a stage of the default run: its numbers are the plain_* of the default summaries.
REMEDIES = {
    "likelihood of the chosen (RPO), 0.02": ["--norm-weight", "0", "--nll-weight", "0.02"],
    "likelihood of the chosen (RPO), 0.05": ["--norm-weight", "0", "--nll-weight", "0.05"],
}
PLAIN_SEEDS = range(8)


def summaries(name, flags=(), seeds=SEEDS):
    """The summaries of train.py with these flags, one for each seed."""
    folder = ROOT / "out" / "results"
    return [train(folder / f"{name}-{seed}", "--seed", str(seed), *flags) for seed in seeds]


def main(argv=()):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    results = {"default": summaries("default"), "remedies": {}}
    for figure in ("frontier.png", "curves.png"):
        shutil.copy(ROOT / "out" / "results" / "default-0" / figure, ROOT / "docs" / figure)
    for name, flags in REMEDIES.items():
        folder = "".join(c if c.isalnum() else "-" for c in name)
        results["remedies"][name] = summaries(folder, flags)
    plain = summaries("plain", ["--norm-weight", "0"], PLAIN_SEEDS)
    results["plain_wellformed"] = [run["policy_wellformed"] for run in plain]
    write_json(results, ROOT / "docs" / "results.json")


if __name__ == "__main__":
    main(sys.argv[1:])
