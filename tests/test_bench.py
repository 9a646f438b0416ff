"""lab/bench.py and lab/doubling.py: what they count, how they form their figures, and whole runs of
tiny shapes."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lab import bench, doubling, sides
from model import GPT, GPTConfig, sequence_logps
from support import figures

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab": 11, "prompt": 3, "response": 4,
        "pairs": 2}
FLAGS = ["--shapes", "toy", "--repeats", "1", "--threads", "1", "--device", "cpu"]
for name, size in TINY.items():
    FLAGS += [f"--{name.replace('_', '-')}", str(size)]


def test_the_operations_are_those_that_pytorch_counts():
    """Of a forward and a backward pass over 2 x 2 sequences of 7 tokens, 4 of them scored; exactly.
    They begin with different tokens, and the last one is not read. The kernel that PyTorch can
    count computes all 6 x 6 weights of the attention."""
    model = GPT(GPTConfig(7, 11, n_layer=2, n_head=2, n_embd=32))
    mask = (torch.arange(7) >= 3).expand(4, 7)
    tokens = torch.arange(28).view(4, 7) % 11
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sequence_logps(model, tokens, mask).sum().backward()
    once = bench.flops(TINY, tokens=4 * 6, scored=4 * 4, seen=4 * 6 * 6)
    assert 3 * once == counter.get_total_flops()


@pytest.mark.parametrize("kind, responses, length, passes", [
    ("dpo", 2, 4, 3), ("generate", 1, bench.NEW, 1)])
def test_useful_is_what_the_tokens_of_one_row_need(kind, responses, length, passes):
    """The row is the prompt and the responses, less the last token of each. Each (query, key) is
    looked at: a token sees the prompt and its own response, up to itself. A backward pass is two
    forward passes."""
    part = [0] * 3 + [i + 1 for i in range(responses) for _ in range(length - 1)]
    seen = sum(part[key] in (0, part[query])
               for query in range(len(part)) for key in range(query + 1))
    once = bench.flops(TINY, len(part), responses * length, seen)
    assert bench.useful_flops(TINY, kind) == passes * once


def test_figures_by_hand():
    """Two turns after the warm-up. Here: 1 and 2 s; there: 3 and 4 s, so 3 and 2 times as much. A
    turn is 6 pairs, 60 tokens, 12 operations; the machine can do 24 and 8 in a second."""
    ours = [{"seconds": s, "losses": [1.0], "memory": 5} for s in (90, 90, 1, 2)]
    there = [{"seconds": s, "losses": [x], "memory": None}
             for s, x in ((70, 1.0), (70, 1.25), (3, 1.0), (4, 1.0))]
    both = {"here": ours, "there": there}
    rows = bench.figures(both, np.array([1, 1, 24, 8]), items=6, tokens=60, operations=12)
    assert rows["here"] == {
        "per_second": [3.75, 4.5, 5.25], "tokens_per_second": [37.5, 45, 52.5],
        "share_of_peak": [0.5625, 0.625, 0.6875], "times_as_fast_here": [1, 1, 1],
        "peak_memory": 5, "losses_compared": 4, "loss_difference": 0}
    assert rows["there"]["per_second"] == [1.625, 1.75, 1.875]
    assert rows["there"]["times_as_fast_here"] == [2.25, 2.5, 2.75]
    assert rows["there"]["loss_difference"] == pytest.approx(0.2)
    assert "4.5 [3.75, 5.25]" in bench.table("tiny", {"dpo": rows})


def test_a_run_of_a_tiny_shape(tmp_path, monkeypatch, capsys):
    """Every figure is there, finite and above 0. How large they are depends on the machine."""
    monkeypatch.setattr(bench, "TURN", 0.05)
    monkeypatch.setitem(bench.SQUARE, "cpu", 256)
    bench.main([*FLAGS, "--json", str(tmp_path / "bench.json")])
    written = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert written["sizes"] == {"toy": TINY}
    for kind, steps in (("dpo", 20), ("generate", 0)):
        (side, row), = written["results"]["toy"][kind].items()
        assert side == "here" and row["losses_compared"] == steps
        for name in ("per_second", "tokens_per_second", "share_of_peak"):
            low, median, high = row[name]
            assert 0 < low <= median <= high < math.inf
        assert sides.resource is None or 1e8 < row["peak_memory"] < 1e10
    ratio = np.divide(*[row[name][1] for row in [written["results"]["toy"]["dpo"]["here"]]
                        for name in ("tokens_per_second", "per_second")])
    assert ratio == pytest.approx(3 + 2 * 4)
    assert "times as fast here" in capsys.readouterr().out


def test_with_trl_the_losses_are_the_same(tmp_path, monkeypatch):
    """Over 20 steps, to 1e-4 of their size. They change by more than that from step to step."""
    pytest.importorskip("trl")
    monkeypatch.setattr(bench, "TURN", 0.05)
    bench.main([*FLAGS, "--against", "trl", "transformers", "--trl-python", sys.executable,
                "--json", str(tmp_path / "bench.json")])
    results = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["results"]["toy"]
    assert list(results["dpo"]) == ["here", "TRL as it comes", "TRL at its best"]
    assert list(results["generate"]) == ["here", "transformers"]
    for row in results["dpo"].values():
        assert row["losses_compared"] == 20 and row["loss_difference"] < 1e-4


def test_the_drawing_has_a_bar_for_each_ratio(tmp_path, monkeypatch):
    """Two shapes and two settings of TRL: four bars as long as the medians, with their numbers, and
    lines from quartile to quartile."""
    ratios = {"TRL as it comes": ([2, 3, 4], [1, 2.5, 3]),
              "TRL at its best": ([1, 1.5, 2], [1, 1, 1])}
    results = {name: {"dpo": {side: {"times_as_fast_here": rows[i]}
                              for side, rows in ratios.items()}}
               for i, name in enumerate(("toy", "small"))}
    drawn = []
    monkeypatch.setattr(figures, "save", lambda fig, path: drawn.append((fig, path)))
    bench.draw(results, tmp_path / "a.png")
    (fig, path), = drawn
    ax = fig.axes[0]
    assert [bar.get_width() for bar in ax.patches] == [3, 2.5, 1.5, 1]
    assert [text.get_text() for text in ax.texts] == ["3.00", "2.50", "1.50", "1.00"]
    lines = [segment[:, 0].tolist() for bars in ax.collections for segment in bars.get_segments()]
    assert lines == [[2, 4], [1, 3], [1, 2], [1, 1]] and path == tmp_path / "a.png"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["toy", "small"]


def test_a_side_that_ends_says_why(tmp_path):
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        side = subprocess.Popen([sys.executable, "-c", "input(); raise SystemExit('no memory')"],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                text=True)
    with side, pytest.raises(SystemExit, match="last words: no memory"):
        bench.order(1, tmp_path / "log", side)


@pytest.mark.parametrize("words, said", [
    ("--n-embd 100 --n-head 3", "--n-embd 100 must be a multiple of --n-head 3"),
    ("--vocab 0", "--vocab: 0 must be at least 1"),
    ("--shapes huge", "--shapes: invalid choice: 'huge'"),
    ("--against trl", "--against needs --trl-python"),
    (f"--trl-python {sys.prefix}", "is no python that has TRL"),
    ("--trl-python absent", "'absent' is no python that has TRL"),
    ("--json .", "'.' is a folder; name a file"),
    ("--device tpu", "--device: tpu is not on this machine")])
def test_flags_that_cannot_be_used_are_refused(capsys, words, said):
    with pytest.raises(SystemExit) as refused:
        bench.main(words.split())
    assert refused.value.code == 2 and said in capsys.readouterr().err


# ---- lab/doubling.py

def test_costs_by_hand(monkeypatch):
    """Twice as many pairs are twice the operations. The cost is the median of the ratios within the
    turns, (3/1, 8/2, 9/3): 3. The ratio of the medians would be 8/2 = 4."""
    monkeypatch.setattr(doubling, "BASE", TINY)
    monkeypatch.setattr(doubling, "SIZES", {"pairs": (4, 1)})
    got = doubling.costs({"base": [1, 2, 3], "pairs 4": [3, 8, 9], "pairs 1": [1, 1, 3]})
    assert [point["size"] for point in got["pairs"]] == [1, 2, 4]
    assert [point["operations"] for point in got["pairs"]] == [0.5, 1, 2]
    assert [point["cost"][1] for point in got["pairs"]] == [1, 1, 3]
    assert [point["seconds"] for point in got["pairs"]] == [1, 2, 8]


def test_the_operations_of_a_longer_response_and_a_wider_model(monkeypatch):
    """Of the shape "small", counted here once more. A token of the response is read (but the last)
    and scored. It sees the prompt, and its response up to itself."""
    def once(p, r, c):
        read, layers, vocab = p + 2 * (r - 1), 6, 512
        seen = sum(range(1, p + 1)) + 2 * sum(p + i for i in range(1, r))
        return read * layers * 12 * c * c + 2 * r * vocab * c + seen * layers * 2 * c

    zero = {name: [1.0] for name in doubling.shapes()}
    got = {size: {point["size"]: point["operations"] for point in points}
           for size, points in doubling.costs(zero).items()}
    base = once(64, 64, 384)
    assert got["response"][256] == pytest.approx(once(64, 256, 384) / base, rel=1e-12)
    assert got["n_embd"][96] == pytest.approx(once(64, 64, 96) / base, rel=1e-12)


def test_a_run_of_doubling(tmp_path, monkeypatch, capsys):
    """Two tiny shapes, one turn. The file holds what is printed, and the figure has its curves."""
    monkeypatch.setattr(doubling, "BASE", TINY)
    monkeypatch.setattr(doubling, "SIZES", {"pairs": (4,)})
    monkeypatch.setattr(bench, "TURN", 0.05)
    drawn = []
    monkeypatch.setattr(figures, "save", lambda fig, path: drawn.append((fig, path)))
    doubling.main(["--to", str(tmp_path), "--repeats", "1", "--threads", "1", "--device", "cpu"])
    written = json.loads((tmp_path / "doubling.json").read_text(encoding="utf-8"))
    base, double = written["costs"]["pairs"]
    assert (base["size"], double["size"], double["operations"]) == (2, 4, 2)
    assert base["cost"] == [1, 1, 1] and 0.2 < double["cost"][1] < 20
    (fig, path), = drawn
    assert path == tmp_path / "doubling.png" and fig.axes[0].get_xlabel() == "pairs a step"
    assert f"{double['cost'][1]:.2f}" in capsys.readouterr().out
