"""Makes docs/results.json, the figures that the README quotes: python docs/results.py (about 20 minutes on 2 cores).

Runs train.py for seeds 0, 1 and 2 with the default objective and with the other remedies, each in out/results/, where a
finished run is not run again, and collects the summaries.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
REMEDIES = {
    "likelihood of the chosen (RPO), 0.02": ["--norm-weight", "0", "--nll-weight", "0.02"],
    "likelihood of the chosen (RPO), 0.05": ["--norm-weight", "0", "--nll-weight", "0.05"],
}


def run(name, flags, seed):
    out = ROOT / "out" / "results" / f"{name}-{seed}"
    if not (out / "summary.json").exists():
        resume = ["--resume"] if out.exists() else []
        subprocess.run([sys.executable, "train.py", "--out-dir", str(out), "--seed", str(seed), *flags, *resume], cwd=ROOT, check=True)
    return out, json.loads((out / "summary.json").read_text(encoding="utf-8"))


def plain(summary):
    """The plain stage of a default run, in the form of a summary whose policy it is."""
    row = summary["rows"]["plain"]
    return summary | {"captured": summary["plain_captured"], "policy_wellformed": row["wellformed"],
                      "objective": row["objective"], "objective_all": row["objective_all"]}


if __name__ == "__main__":
    default = []
    for seed in SEEDS:
        out, summary = run("default", [], seed)
        default.append(summary)
        if seed == 0:
            for figure in ("frontier.png", "curves.png"):
                shutil.copy(out / figure, ROOT / "docs" / figure)
    remedies = {"none: plain DPO": [plain(s) for s in default], "missing mass, 0.15 (the default)": default}
    for name, flags in REMEDIES.items():
        remedies[name] = [run("".join(c if c.isalnum() else "-" for c in name), flags, seed)[1] for seed in SEEDS]
    results = {"default": default, "remedies": remedies}
    (ROOT / "docs" / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8", newline="\n")
