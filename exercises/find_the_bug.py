"""Find the bug: one bug at a time is put into this project's own functions, and you see only what it does.

    python -m exercises.find_the_bug                 the list: a number each, and how the bug shows
    python -m exercises.find_the_bug 7               bug 7 in effect: its symptom, beside the healthy project's figures
    python -m exercises.find_the_bug 7 --hint        where to look
    python -m exercises.find_the_bug 7 --copy DIR    the buggy file, to read and to run by hand
    python -m pytest --bug 7                         every proof, with the bug in effect: which ones see it?
    python -m exercises.find_the_bug 7 --reveal      which it was, how it comes about, and the proof named for it

No file of the project is changed: a bug is in effect inside the process that shows it. They are kept in exercises/bugs.toml.
"""
import argparse
import contextlib
import difflib
import importlib
import inspect
import io
import sys
import tempfile
import textwrap
import tomllib
import types
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import data  # noqa: E402
import dpo  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import tabular  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402

MODULES = [data, dpo, evaluate, model, tabular, train, world]


def bugs():
    """All bugs, a list of dicts with the keys that exercises/bugs.toml explains; bug n is bugs()[n - 1]."""
    return tomllib.loads((ROOT / "exercises" / "bugs.toml").read_text(encoding="utf-8"))["bug"]


def bug(number):
    if not 1 <= number <= len(bugs()):
        raise SystemExit(f"there is no bug {number}; they are numbered 1 to {len(bugs())}")
    return bugs()[number - 1]


# --------------------------------------------------------------------------------------------------------------------
# Putting a bug into effect

def buggy_source(change):
    """The text of the file with the change made. change: a dict with file, old and new."""
    source = (ROOT / change["file"]).read_text(encoding="utf-8")
    if source.count(change["old"]) != 1:
        raise ValueError(f"{change['file']} holds this {source.count(change['old'])} times, wanted once:\n{change['old']}")
    return source.replace(change["old"], change["new"])


def functions(module):
    """{qualified name: function} of a module's functions and methods, decorators taken off."""
    found = {}
    for owner in [module, *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__)]:
        for value in vars(owner).values():
            value = inspect.unwrap(getattr(value, "__func__", value))
            value = getattr(getattr(value, "hypothesis", None), "inner_test", value)
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                found[value.__qualname__] = value
    return found


def changed_module(change):
    """The module of a change, and the same executed with the change made."""
    module = importlib.import_module(Path(change["file"]).stem)
    changed = types.ModuleType(module.__name__)
    changed.__file__ = module.__file__
    exec(compile(buggy_source(change), module.__file__, "exec"), changed.__dict__)
    return module, changed


def buggy_function(change):
    """The name of the function that a change is in, such as "data.pad" or "model.GPT.hidden"."""
    line = (ROOT / change["file"]).read_text(encoding="utf-8").split(change["old"])[0].count("\n") + 1
    module = importlib.import_module(Path(change["file"]).stem)
    inside = {name: f.__code__.co_firstlineno for name, f in functions(module).items() if f.__code__.co_firstlineno <= line}
    return f"{module.__name__}.{max(inside, key=inside.get)}"


@contextlib.contextmanager
def in_effect(change):
    """With this, the change is made: every function that it touches runs the changed code, wherever it was imported."""
    module, changed = changed_module(change)
    after, before = functions(changed), {}
    for name, function in functions(module).items():
        if function.__code__ != after[name].__code__ or function.__defaults__ != after[name].__defaults__:
            before[function] = function.__code__, function.__defaults__
            function.__code__, function.__defaults__ = after[name].__code__, after[name].__defaults__
    forget()
    try:
        yield
    finally:
        for function, (code, defaults) in before.items():
            function.__code__, function.__defaults__ = code, defaults
        forget()


def forget():
    """Empty the project's caches: what was computed without the bug must not be used with it."""
    for module in MODULES:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


# --------------------------------------------------------------------------------------------------------------------
# Symptoms

def things():
    """What the expressions of a symptom may use, made anew each time, so that with and without the bug it is the same."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    toy = data.get_tokenizer("toy")
    tokens = torch.tensor([[1, 2, 0, 3, 4, 4], [2, 0, 1, 4, 0, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()
    other_first_token = tokens.clone()
    other_first_token[0, 3] = 4                            # another response, which differs in its first token alone
    logits = 3 * torch.randn(2, 6, 5, generator=g)
    impossible = logits.clone()
    impossible[0, 0, 2] = -torch.inf                       # a prompt token that the model holds for impossible
    torch.manual_seed(1)
    toy_gpt = model.GPT(model.GPTConfig(block_size=16, vocab_size=10, n_layer=2, n_head=1, n_embd=16)).eval()
    dropout_gpt = model.GPT(model.GPTConfig(block_size=16, vocab_size=10, n_layer=1, n_head=1, n_embd=8, dropout=0.5)).train()
    tiny = model.GPT(model.GPTConfig(block_size=6, vocab_size=5, n_layer=1, n_head=1, n_embd=4)).double()
    batch = {"tokens": tokens.repeat(3, 1), "response_mask": mask.repeat(3, 1),
             "ref_chosen_logps": torch.tensor([-9., -4, -6]).double(), "ref_rejected_logps": torch.tensor([-5., -8, -3]).double()}
    example = data.tokenize([data.Pair("comedy: the plot was", " superb and scary. I loved it.", " very dull, but dark. I hated it.")], toy)[0][0]
    border = data.tokenize([data.Pair("very fun", "ny and dark", "no")], toy)[0][0]
    three_ref, three_reward = torch.tensor([.5, .3, .2]).double().log(), torch.tensor([0., 1, 1]).double()
    loss = lambda h, **kind: dpo.dpo_loss(torch.tensor([h]), *torch.zeros(3, 1), beta=1.0, **kind)[0]
    return {
        **{k: v for m in (dpo, world, data, model) for k, v in vars(m).items() if not k.startswith("_")},
        "T": lambda *v: torch.tensor(v), "tokens": tokens, "mask": mask, "logits": logits, "other_first_token": other_first_token,
        "empty_mask": torch.zeros_like(mask), "uniform_logits": torch.zeros(2, 6, 5), "impossible_logits": impossible, "toy": toy,
        "sure_logits": 20 * torch.eye(5)[[2, 0, 3, 4, 4, 1]][None], "sure_tokens": tokens[:1],    # knows every next token of row 0
        "cubic": torch.tensor([1.0, -2.0, 0.5]).double(), "steep_logits": torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(4000, -1),
        "toy_gpt": toy_gpt, "dropout_gpt": dropout_gpt, "tiny_policy": tiny, "tiny_batch": batch, "example": example, "border": border,
        "long_pair": data.Pair("a", "bcdefghijklmno", "bcdefghijkl?"), "three_ref": three_ref, "three_reward": three_reward,
        "plain": loss, "robust": lambda h: loss(h, loss_type="robust", label_smoothing=0.1),
        "objective_minus_beta_log_z": lambda: tabular.objective(world.optimal_policy(three_ref, three_reward, 0.5), three_ref, three_reward, 0.5)
        - 0.5 * world.log_partition(three_ref, three_reward, 0.5),
        "first_loss_with_dropout": lambda: first_dpo_row(dropout=0.3)["loss"],
        "first_accuracy_of_ties": lambda: first_dpo_row(uniform=True)["rewards/accuracies"],
        "first_measurements": first_measurements, "load_run_with_another_reference": load_run_with_another_reference,
    }


def first_dpo_row(dropout=0.0, uniform=False):
    """The first line that DPO logs, for a small model on 64 pairs."""
    toy = data.get_tokenizer("toy")
    examples, _ = data.tokenize(data.make_preferences(64), toy)
    reference = model.GPT(model.GPTConfig(block_size=32, vocab_size=toy.n_vocab, n_layer=1, n_head=1, n_embd=32, dropout=dropout)).eval()
    if uniform:
        with torch.no_grad():
            for p in reference.parameters():
                p.zero_()
    with tempfile.TemporaryDirectory() as folder, quietly():
        args = train.parse_args(["--out-dir", folder, "--epochs", "1", "--batch-size", "32"])
        train.train_dpo("dpo", reference, examples, train.reference_logps(reference, examples, 32, "cpu"), args,
                        train.Log(Path(folder) / "metrics.jsonl"), 0.0, 0.0)
        return evaluate.read_jsonl(Path(folder) / "metrics.jsonl")[0]


def first_measurements():
    """(step, KL) of the exact measurements in a short run."""
    with tempfile.TemporaryDirectory() as folder:
        short_run(folder, [])
        return [(r["step"], round(r["kl"], 4)) for r in evaluate.read_jsonl(Path(folder) / "metrics.jsonl") if "kl" in r][:3]


def load_run_with_another_reference():
    with tempfile.TemporaryDirectory() as folder:
        short_run(folder, [])
        model.save_model(model.load_model(Path(folder) / "dpo.pt")[0], Path(folder) / "sft.pt", tokenizer="toy")
        try:
            evaluate.load_run(folder)
        except SystemExit:
            return "refused"
        return "accepted"


@contextlib.contextmanager
def quietly():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def short_run(folder, flags, texts=640, pairs=256, size=32):
    """A train.py run in small, silent. Plain DPO: nothing covers up for Eq. 7."""
    usual, train.SFT_TEXTS = train.SFT_TEXTS, texts
    try:
        with quietly():
            train.main(["--out-dir", str(folder), "--pairs", str(pairs), "--epochs", "1", "--n-embd", str(size), "--device", "cpu",
                        *([] if "--norm-weight" in flags else ["--norm-weight", "0"]), *flags])
    finally:
        train.SFT_TEXTS = usual


def value_of(expression):
    """The value of one line of a symptom, as text; an exception is a value too."""
    try:
        value = eval(expression, things())
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


def training_figures(flags):
    """What one sees of a training run: [(name, value as text), ...], and three answers."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "run"
        try:
            short_run(folder, flags, texts=9_600, pairs=6_400, size=64)
        except (SystemExit, Exception) as error:
            return [("the run stopped", f"{type(error).__name__}: {error}"[:300])], []
        _, tokenizer, models = evaluate.load_run(folder)
        rows = evaluate.read_jsonl(folder / "metrics.jsonl")
        torch.manual_seed(0)
        prompt = world.prompts()[1][0]
        ids = tokenizer.encode_ordinary(prompt)
        drawn = models["dpo"].generate([ids] * 200, 40, eos_id=tokenizer.eot_token)
        answers = evaluate.answers(models["dpo"], tokenizer, prompt, 3)
    logged = [r for r in rows if r["stage"] == "dpo" and "loss" in r]
    first, last = logged[0], logged[-1]
    sft = [r for r in rows if r["stage"] == "sft"]
    exact = [r for r in rows if r["stage"] == "dpo" and "wellformed" in r]
    figures = [("SFT loss, nats a text, first steps and last", f"{sft[0]['loss']:.2f} -> {sft[-1]['loss']:.2f}")]
    for key, name in (("loss", "DPO loss, nats"), ("rewards/accuracies", "accuracy"), ("rewards/chosen", "reward of the chosen"),
                      ("rewards/rejected", "reward of the rejected"), ("logps/chosen", "log-prob of the chosen, nats"),
                      ("logps/rejected", "log-prob of the rejected, nats"), ("grad_norm", "gradient norm")):
        figures.append((f"{name}, step 0 -> last", f"{first[key]:.3f} -> {last[key]:.3f}"))
    figures += [("accuracy that the labels' noise allows", f"{first['rewards/ceiling']:.3f}"),
                ("true reward, reference -> policy, exact", f"{exact[0]['reward']:+.3f} -> {exact[-1]['reward']:+.3f}"),
                ("KL to the reference, nats, exact", f"{exact[0]['kl']:.3f} -> {exact[-1]['kl']:.3f}"),
                ("well-formed, reference -> policy, exact", f"{exact[0]['wellformed']:.1%} -> {exact[-1]['wellformed']:.1%}"),
                ("tokens an answer, 200 samples", f"{sum(map(len, drawn)) / 200:.1f}"),
                ("answers that end, 200 samples", f"{sum(r[-1:] == [tokenizer.eot_token] for r in drawn) / 200:.0%}")]
    return figures, [textwrap.shorten("".join(c if c.isprintable() else "?" for c in prompt + a), 110) for a in answers]


def symptom(number):
    """Text: what the bug does, beside what the healthy project does."""
    this = bug(number)
    if "show" in this:
        lines = []
        with tqdm(total=2 * len(this["show"]), desc="without and with the bug", leave=False, disable=None) as bar:
            for expression in this["show"]:
                healthy = value_of(expression)
                bar.update()
                with in_effect(this):
                    buggy = value_of(expression)
                bar.update()
                lines += [expression, f"    healthy   {healthy}", f"    buggy     {buggy}", ""]
        return "\n".join(lines)
    with tqdm(total=2, desc="two short runs, about 15 s each", unit="run", leave=False, disable=None) as bar:
        healthy, healthy_answers = training_figures(this["train"])
        bar.update()
        with in_effect(this):
            buggy, buggy_answers = training_figures(this["train"])
        bar.update()
    buggy = dict(buggy)
    lines = [f"{'a short training run, plain DPO':<46}{'healthy':>20}{'buggy':>22}"]
    lines += [f"{name:<46}{value:>20}{buggy.get(name, '-'):>22}" for name, value in healthy]
    lines += [f"{name}: {value}" for name, value in buggy.items() if name == "the run stopped"]
    lines += ["", *(f"healthy   {a}" for a in healthy_answers), *(f"buggy     {a}" for a in buggy_answers)]
    return "\n".join(lines)


def reveal(number):
    """Text: the change, how it comes about, and the proof that is named for it."""
    this = bug(number)
    diff = difflib.unified_diff((ROOT / this["file"]).read_text(encoding="utf-8").splitlines(), buggy_source(this).splitlines(),
                                this["file"], f"{this['file']} with bug {number}", lineterm="", n=2)
    return "\n".join([f"Bug {number}: {this['pitfall']}", "", *textwrap.wrap(this["why"], 100), "", *diff, "",
                      f"The proof named for it: tests/{this['proof']}",
                      f"Run all of them against it: python -m pytest --bug {number}"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", help="which bug; without it, the list")
    parser.add_argument("--hint", action="store_true", help="where to look")
    parser.add_argument("--copy", metavar="DIR", type=Path, help="write the buggy file into this folder; never over another file")
    parser.add_argument("--reveal", action="store_true", help="which it was")
    args = parser.parse_args()
    if args.number is None:
        for n, b in enumerate(bugs(), 1):
            print(f"{n:>3}  " + ("shows in a training run (half a minute)" if "train" in b else f"shows in {b['show'][0]}"))
        print("\nOne of them: python -m exercises.find_the_bug 7")
    elif args.reveal:
        print(reveal(args.number))
    elif args.hint:
        print(bug(args.number)["hint"])
    elif args.copy:
        this, source = bug(args.number), buggy_source(bug(args.number))
        args.copy.mkdir(parents=True, exist_ok=True)
        try:
            with open(args.copy / this["file"], "x", encoding="utf-8", newline="\n") as f:
                f.write(source)
        except FileExistsError:
            raise SystemExit(f"{args.copy / this['file']} exists and is left as it is; choose another folder") from None
        print(f"Wrote {args.copy / this['file']}.")
    else:
        print(f"Bug {args.number} is in effect.\n\n{symptom(args.number)}\nA hint: --hint. The proofs' opinion: "
              f"python -m pytest --bug {args.number}. Which it was: --reveal.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
