"""What the notebooks share: one look for all figures, claims that are checked, and a reference policy to start from.

Nothing of DPO is defined here; that is imported from the project's own files.
"""
import copy
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from IPython.display import Markdown, clear_output, display  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

SEED = int(os.environ.get("COURSE_SEED", 0))         # every notebook holds for any seed; another one: COURSE_SEED=1 jupyter lab
torch.manual_seed(SEED)
warnings.filterwarnings("ignore", message=".*IProgress not found.*")      # tqdm's advice to install what is not needed

# The same colour for the same thing in every notebook, those of the project's own figures (Okabe and Ito's, told apart by
# colour-blind readers and in grey).
COLOUR = {**evaluate.COLOURS, "policy": evaluate.COLOURS["dpo"], "chosen": "#0072B2", "reward": "#E69F00", "true": "#009E73",
          "wrong": "#D55E00"}
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
                     "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": 100, "figure.figsize": (7.5, 3.6),
                     "figure.constrained_layout.use": True, "axes.titlesize": 10})


def claim(statement, truth):
    """Check what the text says. A claim that does not hold stops the notebook."""
    if not bool(truth):
        raise AssertionError(f"This does not hold: {statement}")
    print(f"holds: {statement}")


def say(text):
    """Show text with Markdown in it; for sentences whose numbers are computed."""
    display(Markdown(text))


def table(rows, header, align=None):
    """Show rows, lists of texts and numbers, under a header. align: "l" or "r" a column."""
    align = align or ["l"] + ["r"] * (len(header) - 1)
    cell = lambda v: f"{v:.3f}" if isinstance(v, float) else str(v).replace("|", "\\|")
    lines = ["| " + " | ".join(map(cell, header)) + " |", "|" + "|".join("---:" if a == "r" else ":---" for a in align) + "|"]
    say("\n".join(lines + ["| " + " | ".join(cell(v) for v in row) + " |" for row in rows]))


def slider(draw, **values):
    """draw(name=value) again whenever a slider is moved; values: a list for each name. On a page without a kernel there is nothing
    to move, so every slider stands beside a figure that says the same."""
    import ipywidgets
    sliders = {name: ipywidgets.SelectionSlider(options=options, value=options[len(options) // 2], continuous_update=False)
               for name, options in values.items()}
    widget = ipywidgets.interactive(lambda **chosen: draw(**chosen), **sliders)
    bundle = widget._repr_mimebundle_() | {"text/plain": "(a slider, when the notebook is run)"}
    display(bundle, raw=True)


def reference(texts=19_200):
    """A GPT fitted to reviews of the toy world, as train.py does it in its first step: (model, tokenizer), in eval mode.

    About ten seconds on a laptop. texts: how many reviews it reads.
    """
    tokenizer = data.get_tokenizer("toy")
    corpus = [(tokenizer.encode_ordinary(x), tokenizer.encode_ordinary(y) + [tokenizer.eot_token])
              for x, y in data.make_sft_corpus(texts, SEED)]
    torch.manual_seed(SEED)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=64))
    with tempfile.TemporaryDirectory() as folder:
        args = train.parse_args(["--seed", str(SEED), "--out-dir", folder])
        train.train_sft(model, corpus, args, train.Log(Path(folder) / "metrics.jsonl"))
    clear_output(wait=True)                              # the progress bar has served
    model.eval().requires_grad_(False)
    print(f"A reference of {sum(p.numel() for p in model.parameters()):,} parameters has read {texts:,} reviews.")
    return model, tokenizer


def copy_of(model):
    """A policy that starts as the reference: the same weights, its own storage, trainable."""
    return copy.deepcopy(model).requires_grad_(True).eval()
