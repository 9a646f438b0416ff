"""Find the bug: the tool puts one bug into this project's own functions and shows what it does.

    python -m exercises.find_the_bug               the list: each bug's number, and where it shows
    python -m exercises.find_the_bug 7             bug 7 in effect: what it does, beside what the
                                                   healthy project does
    python -m exercises.find_the_bug 7 --hint      where to look
    python -m exercises.find_the_bug 7 --copy DIR  the buggy file, to read and to run by hand
    python -m pytest --bug 7                       every proof, with the bug in effect: which of
                                                   them see it?
    python -m exercises.find_the_bug 7 --reveal    which bug it was, how it comes about, and the
                                                   proof named for it

No file of the project is changed: a bug is in effect only inside the process that shows it. The
bugs are kept in exercises/bugs.toml.
"""
import argparse
import contextlib
import difflib
import io
import sys
import tempfile
import textwrap
import tomllib
from pathlib import Path

import torch
from tqdm import tqdm

import data
import dpo
import losses
import model
import ppo
import train
import world
from exercises.changes import ROOT, changed_source, in_effect, module_name
from lab import tabular
from support import preferences, trie
from support.checkpoints import load_model, save_model
from support.files import read_jsonl
from support.flags import writable
from support.run import Run, load_run
from support.show import sample_answers


def bugs():
    """All bugs, a list of dicts with the keys that exercises/bugs.toml explains.

    Bug n is bugs()[n - 1].
    """
    return tomllib.loads((ROOT / "exercises" / "bugs.toml").read_text(encoding="utf-8"))["bug"]


def bug(number):
    if not 1 <= number <= len(bugs()):
        raise SystemExit(f"there is no bug {number}; they are numbered 1 to {len(bugs())}")
    return bugs()[number - 1]


def buggy_function(this):
    """The function that a bug is in, such as "data.pad" or "model.GPT.hidden"."""
    return f"{module_name(this['file'])}.{this['function']}"


# ---- What the expressions of a symptom may use

def things():
    """The names in the expressions of a symptom, a dict.

    All of them are made anew for each expression: they are the same with and without the bug.
    """
    names = {}
    for module in (dpo, losses, ppo, world, data, model, trie, preferences):
        names |= {k: v for k, v in vars(module).items() if not k.startswith("_")}
    for function in (T, plain, robust, objective_minus_beta_log_z, first_loss_with_dropout,
                     first_accuracy_of_ties, first_measurements, load_run_with_another_reference):
        names[function.__name__] = function
    return names | tensors() | models() | texts()


def tensors():
    """Small batches: 2 texts of 6 tokens over a vocabulary of 5."""
    tokens = torch.tensor([[1, 2, 0, 3, 4, 4], [2, 0, 1, 4, 0, 0]])  # (B, T)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()  # (B, T)
    other_first_token = tokens.clone()
    other_first_token[0, 3] = 4  # another response: only its first token is different
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 6, 5, generator=generator)  # (B, T, V)
    impossible_logits = logits.clone()
    impossible_logits[0, 0, 2] = -torch.inf  # a token of the prompt has probability 0
    next_tokens = [2, 0, 3, 4, 4, 1]  # what follows the tokens of row 0
    return {
        "EOS": 9,
        "tokens": tokens,
        "mask": mask,
        "empty_mask": torch.zeros_like(mask),
        "other_first_token": other_first_token,
        "logits": logits,
        "impossible_logits": impossible_logits,
        "uniform_logits": torch.zeros(2, 6, 5),
        "sure_logits": 20 * torch.eye(5)[next_tokens][None],
        "sure_tokens": tokens[:1],
        "steep_logits": torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(4000, -1),
        "cubic": torch.tensor([1.0, -2.0, 0.5]).double(),
        "three_ref": THREE_REF.clone(),
        "three_reward": THREE_REWARD.clone(),
    }


def models():
    """Untrained models, and a batch of 3 pairs for the smallest one."""
    torch.manual_seed(1)
    toy_gpt = small_gpt(block_size=16, vocab_size=10, n_layer=2, n_embd=16).eval()
    dropout_gpt = small_gpt(block_size=16, vocab_size=10, n_layer=1, n_embd=8, dropout=0.5).train()
    tiny_policy = small_gpt(block_size=6, vocab_size=5, n_layer=1, n_embd=4).double()
    small = tensors()
    tiny_batch = {
        "tokens": small["tokens"].repeat(3, 1),
        "response_mask": small["mask"].repeat(3, 1),
        "ref_chosen_logps": torch.tensor([-9., -4, -6]).double(),
        "ref_rejected_logps": torch.tensor([-5., -8, -3]).double(),
    }
    return {"toy_gpt": toy_gpt, "dropout_gpt": dropout_gpt,
            "tiny_policy": tiny_policy, "tiny_batch": tiny_batch}


def small_gpt(**config):
    return model.GPT(model.GPTConfig(n_head=1, **config))


def texts():
    """The toy tokenizer, and pairs to tokenise with it."""
    toy = data.get_tokenizer("toy")
    reviews = data.Pair("comedy: the plot was", " superb and scary. I loved it.",
                        " very dull, but dark. I hated it.")
    half_a_word = data.Pair("very fun", "ny and dark", "no")
    return {
        "toy": toy,
        "example": data.tokenize([reviews], toy)[0][0],
        "border": data.tokenize([half_a_word], toy)[0][0],
        "long_pair": data.Pair("a", "bcdefghijklmno", "bcdefghijkl?"),
    }


# A world of three responses
THREE_REF = torch.tensor([.5, .3, .2]).double().log()
THREE_REWARD = torch.tensor([0., 1, 1]).double()


def T(*values):
    return torch.tensor(values)


def plain(h):
    """The DPO loss at beta = 1 of a pair with preference logit h."""
    return dpo.dpo_loss(torch.tensor([h]), *torch.zeros(3, 1), beta=1.0)[0]


def robust(h):
    """The same of robust DPO, for labels of which one in ten is flipped."""
    return losses.robust_loss(torch.tensor([h]), *torch.zeros(3, 1), beta=1.0)[0]


def objective_minus_beta_log_z(beta=0.5):
    """J(pi*) - beta log Z, which is 0 by Eq. 14."""
    star = world.optimal_policy(THREE_REF, THREE_REWARD, beta)
    log_z = world.log_partition(THREE_REF, THREE_REWARD, beta)
    return tabular.objective(star, THREE_REF, THREE_REWARD, beta) - beta * log_z


def first_loss_with_dropout():
    return first_dpo_row(dropout=0.3)["loss"]


def first_accuracy_of_ties():
    return first_dpo_row(uniform=True)["rewards/accuracies"]


def first_dpo_row(dropout=0.0, uniform=False):
    """The first line that DPO logs, for a small model on 64 pairs."""
    toy = data.get_tokenizer("toy")
    examples, _ = data.tokenize(data.make_preferences(64), toy)
    reference = small_gpt(block_size=32, vocab_size=toy.n_vocab, n_layer=1, n_embd=32,
                          dropout=dropout).eval()
    if uniform:
        with torch.no_grad():
            for p in reference.parameters():
                p.zero_()
    with tempfile.TemporaryDirectory() as folder, quietly():
        run = Run(folder)
        ref_logps = train.reference_logps(reference, examples, 32)
        train.train_dpo(reference, examples, ref_logps, run,
                        beta=1.0, epochs=1, batch_size=32, lr=1.5e-3, seed=0)
        return read_jsonl(run.metrics)[0]


def first_measurements():
    """(step, KL) of the first three exact measurements in a short run."""
    with tempfile.TemporaryDirectory() as folder:
        short_run(folder, [])
        rows = read_jsonl(Path(folder) / "metrics.jsonl")
    return [(row["step"], round(row["kl"], 4)) for row in rows if "kl" in row][:3]


def load_run_with_another_reference():
    """What load_run says to a run whose sft.pt was replaced by another model."""
    with tempfile.TemporaryDirectory() as folder:
        short_run(folder, [])
        other, _ = load_model(Path(folder) / "dpo.pt")
        save_model(other, Path(folder) / "sft.pt", tokenizer="toy")
        try:
            load_run(folder)
        except SystemExit:
            return "refused"
        return "accepted"


# ---- A short training run

@contextlib.contextmanager
def quietly():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def short_run(folder, flags, texts=640, pairs=256, size=32):
    """A small run of train.py that prints nothing.

    It is plain DPO unless the flags say otherwise: no other term of the loss hides a bug of Eq. 7.
    """
    if "--stray-weight" not in flags:
        flags = ["--stray-weight", "0", *flags]
    usual, train.SFT_TEXTS = train.SFT_TEXTS, texts
    try:
        with quietly():
            train.main(["--out-dir", str(folder), "--pairs", str(pairs), "--epochs", "1",
                        "--n-embd", str(size), "--device", "cpu", *flags])
    finally:
        train.SFT_TEXTS = usual


# What the log of DPO holds, and its name in the table
CURVES = {
    "loss": "DPO loss, nats",
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "reward of the chosen",
    "rewards/rejected": "reward of the rejected",
    "logps/chosen": "log-prob of the chosen, nats",
    "logps/rejected": "log-prob of the rejected, nats",
    "grad_norm": "gradient norm",
}


def training_figures(flags):
    """What a training run shows: a list of (name, value as text), and a list of three answers."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "run"
        try:
            short_run(folder, flags, texts=9_600, pairs=6_400, size=64)
        except (SystemExit, Exception) as error:
            return [("the run stopped", f"{type(error).__name__}: {error}"[:300])], []
        _, tokenizer, policies = load_run(folder)
        rows = read_jsonl(folder / "metrics.jsonl")

    policy, eos, prompt = policies["dpo"], tokenizer.eot_token, world.prompts()[1][0]
    torch.manual_seed(0)
    drawn = policy.generate([tokenizer.encode_ordinary(prompt)] * 200, 40, eos_id=eos)
    tokens = sum(len(answer) for answer in drawn) / 200
    ended = sum(answer[-1:] == [eos] for answer in drawn) / 200
    answers = [printable(prompt + a) for a in sample_answers(policy, tokenizer, prompt, 3)]

    sft = [row for row in rows if row["stage"] == "sft"]
    logged = [row for row in rows if row["stage"] == "dpo" and "loss" in row]
    exact = [row for row in rows if row["stage"] == "dpo" and "wellformed" in row]
    figures = [("SFT loss, nats a text, first steps and last", ends(sft, "loss", ".2f"))]
    for key, name in CURVES.items():
        figures.append((f"{name}, step 0 -> last", ends(logged, key, ".3f")))
    return figures + [
        ("accuracy that the labels' noise allows", f"{logged[0]['rewards/ceiling']:.3f}"),
        ("true reward, reference -> policy, exact", ends(exact, "reward", "+.3f")),
        ("KL to the reference, nats, exact", ends(exact, "kl", ".3f")),
        ("well-formed, reference -> policy, exact", ends(exact, "wellformed", ".1%")),
        ("tokens an answer, 200 samples", f"{tokens:.1f}"),
        ("answers that end, 200 samples", f"{ended:.0%}"),
    ], answers


def ends(rows, key, format_spec):
    """The first and the last value of a logged curve, as text."""
    return f"{rows[0][key]:{format_spec}} -> {rows[-1][key]:{format_spec}}"


def printable(text):
    """A text in one line, at most 110 characters, with ? for what a terminal cannot show."""
    return textwrap.shorten("".join(c if c.isprintable() else "?" for c in text), 110)


# ---- Symptoms

def symptom(number):
    """Text: what the bug does, beside what the healthy project does."""
    this = bug(number)
    return shown_in_expressions(this) if "show" in this else shown_in_training(this)


def shown_in_expressions(this):
    lines = []
    with tqdm(total=2 * len(this["show"]), desc="without and with the bug", leave=False,
              disable=None) as bar:
        for code in this["show"]:
            healthy = value_of(code)
            bar.update()
            with in_effect(this):
                buggy = value_of(code)
            bar.update()
            lines += [code, f"    healthy   {healthy}", f"    buggy     {buggy}", ""]
    return "\n".join(lines)


def value_of(code):
    """The value of one expression of a symptom, as text; an exception is a value too."""
    try:
        value = eval(code, things())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return show(value)


def show(value):
    if torch.is_tensor(value):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(v) for v in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def shown_in_training(this):
    with tqdm(total=2, desc="two short runs, about 15 s each", unit="run", leave=False,
              disable=None) as bar:
        healthy, healthy_answers = training_figures(this["train"])
        bar.update()
        with in_effect(this):
            buggy, buggy_answers = training_figures(this["train"])
        bar.update()
    buggy = dict(buggy)
    lines = [f"{'a short training run, plain DPO':<46}{'healthy':>20}{'buggy':>22}"]
    for name, value in healthy:
        lines.append(f"{name:<46}{value:>20}{buggy.get(name, '-'):>22}")
    if "the run stopped" in buggy:
        lines.append(f"the run stopped: {buggy['the run stopped']}")
    lines.append("")
    lines += [f"healthy   {answer}" for answer in healthy_answers]
    lines += [f"buggy     {answer}" for answer in buggy_answers]
    return "\n".join(lines)


# ---- The command

def reveal(number):
    """Text: the change, how it comes about, and the proof that is named for it."""
    this = bug(number)
    healthy = (ROOT / this["file"]).read_text(encoding="utf-8").splitlines()
    buggy = changed_source(this).splitlines()
    diff = difflib.unified_diff(healthy, buggy, this["file"], f"{this['file']} with bug {number}",
                                lineterm="", n=2)
    return "\n".join([f"Bug {number}: {this['pitfall']}", "", *textwrap.wrap(this["why"], 100), "",
                      *diff, "",
                      f"The proof named for it: tests/{this['proof']}",
                      f"Run all of them against it: python -m pytest --bug {number}"])


def copy(number, folder):
    """Write the buggy file into a folder. Refuses to overwrite a file."""
    this = bug(number)
    path = folder / this["file"]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x", encoding="utf-8", newline="\n") as f:
            f.write(changed_source(this))
    except FileExistsError:
        raise SystemExit(f"{path} exists and is left as it is; choose another folder") from None
    print(f"Wrote {path}.")


def list_all():
    for number, this in enumerate(bugs(), 1):
        where = "a training run (half a minute)" if "train" in this else this["show"][0]
        print(f"{number:>3}  shows in {where}")
    print("\nOne of them: python -m exercises.find_the_bug 7")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", help="which bug; without it, the list")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--hint", action="store_true", help="where to look")
    one.add_argument("--copy", metavar="DIR", type=writable,
                     help="write the buggy file into this folder; never over another file")
    one.add_argument("--reveal", action="store_true", help="which bug it was")
    args = parser.parse_args(argv)
    if args.number is None:
        if args.hint or args.copy or args.reveal:
            parser.error("give the number of a bug, as in: 7 --hint")
        list_all()
    elif args.reveal:
        print(reveal(args.number))
    elif args.hint:
        print(bug(args.number)["hint"])
    elif args.copy:
        copy(args.number, args.copy)
    else:
        print(f"Bug {args.number} is in effect.\n\n{symptom(args.number)}\n"
              f"A hint: --hint. What the proofs say: python -m pytest --bug {args.number}. "
              "Which bug it was: --reveal.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
