"""What the notebooks share: the look of the figures, claims that are checked, and a reference.

Nothing of DPO is defined here. The notebooks import that from the project's own files.
"""
import copy
import os
import tempfile
import time
import warnings

import ipywidgets
import matplotlib.pyplot as plt
import torch
from IPython import get_ipython
from IPython.display import Markdown, clear_output, display

import data
import train
from model import GPT, GPTConfig
from support.flags import TOY
from support.run import Run
from support.show import COLOURS

# Every notebook holds for any seed. To try another one: COURSE_SEED=1 jupyter lab notebooks
SEED = int(os.environ.get("COURSE_SEED", 0))
torch.manual_seed(SEED)
# tqdm's advice to install a package that nothing here needs
warnings.filterwarnings("ignore", message=".*IProgress not found.*")

# The same thing has the same colour in every notebook and in the project's own figures.
COLOUR = COLOURS | {"policy": COLOURS["dpo"], "chosen": COLOURS["dpo"], "wrong": COLOURS["plain"],
                    "true": COLOURS["optimum"], "reward": "#E69F00"}
# train.py draws into files. A notebook shows its figures.
get_ipython().run_line_magic("matplotlib", "inline")
plt.rcParams.update({
    "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E6E6E6", "legend.frameon": False,
    "figure.dpi": 100, "figure.figsize": (7.5, 3.6), "figure.constrained_layout.use": True})


def claim(statement, truth):
    """Check a statement of the text. A statement that does not hold stops the notebook."""
    if not bool(truth):
        raise AssertionError(f"This does not hold: {statement}")
    print(f"holds: {statement}")


def say(text):
    """Show a text with Markdown in it. It is for sentences whose numbers are computed."""
    display(Markdown(text))


def table(rows, header, align=None):
    """Show rows under a header. A row is a list of texts and numbers.

    align: "l" or "r" for each column. By default the first column is "l" and the others are "r".
    """
    align = align or ["l"] + ["r"] * (len(header) - 1)
    rule = "|".join("---:" if side == "r" else ":---" for side in align)
    lines = [table_row(header), f"|{rule}|"]
    lines += [table_row(row) for row in rows]
    say("\n".join(lines))


def table_row(values):
    cells = []
    for value in values:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        cells.append(text.replace("|", "\\|"))  # a bar would end the cell
    return "| " + " | ".join(cells) + " |"


def slider(draw, **values):
    """Call draw(name=value) again whenever somebody moves a slider.

    values: a list of the possible values for each name. On a page without a kernel nothing can be
    moved. So every slider stands beside a figure that says the same.
    """
    sliders = {}
    for name, options in values.items():
        sliders[name] = ipywidgets.SelectionSlider(
            options=options, value=options[len(options) // 2], continuous_update=False)
    widget = ipywidgets.interactive(draw, **sliders)
    bundle = widget._repr_mimebundle_() | {"text/plain": "(a slider, when the notebook is run)"}
    display(bundle, raw=True)
    # nbclient answers each output of a widget. If the cell ends at that moment, nbclient can miss
    # the end, and then it waits until its timeout. So the cell ends a little later.
    time.sleep(0.5)


def reference(texts=19_200):
    """A GPT fitted to reviews of the toy world, as in the first step of train.py.

    It takes about ten seconds on a laptop. texts: how many reviews the model reads.
    Returns (model, tokenizer). The model is in eval mode, and its weights are frozen.
    """
    tokenizer = data.get_tokenizer("toy")
    corpus = []
    for prompt, response in data.make_sft_corpus(texts, SEED):
        response_ids = tokenizer.encode_ordinary(response) + [tokenizer.eot_token]
        corpus.append((tokenizer.encode_ordinary(prompt), response_ids))
    torch.manual_seed(SEED)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab,
                          n_layer=1, n_head=2, n_embd=64))
    with tempfile.TemporaryDirectory() as folder:
        train.train_sft(model, corpus, Run(folder), epochs=TOY["sft_epochs"],
                        batch_size=train.SFT_BATCH, lr=TOY["sft_lr"], seed=SEED)
    clear_output(wait=True)  # the progress bar has served
    model.eval().requires_grad_(False)
    size = sum(p.numel() for p in model.parameters())
    print(f"A reference of {size:,} parameters has read {texts:,} reviews.")
    return model, tokenizer


def copy_of(model):
    """A policy that starts as the reference: the same weights in its own storage, trainable."""
    return copy.deepcopy(model).requires_grad_(True).eval()
