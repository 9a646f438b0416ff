"""A user's own pairs: loading them for train.py, and measuring on what was held out.

Nobody can list all responses here. So figures come from held-out pairs and from samples.
"""
import math
from array import array
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

import data
from losses import LOSSES, SMOOTHED
from model import GPT, sequence_logps
from support.checkpoints import load_model
from support.preferences import digest, hold_out, leave_out_equal, list_reasons, places, read_rows
from support.run import data_sha256
from support.statistics import mean_and_se


class Examples:
    """Pairs of a file in tokens, as a list of data.Example. Each is made when it is asked for.

    tokens: one array for all pairs, since lists of numbers take 18 times the memory. table (N,4):
    of each pair its line and the lengths of prompt, chosen and rejected. starts (N,): where its
    tokens begin. rows: the pairs that are in this list.
    """

    def __init__(self, path, tokens, table, starts, rows):
        self.path, self.tokens, self.table, self.starts = path, tokens, table, starts
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        _, prompt, chosen, rejected = self.table[row].tolist()
        start, end = int(self.starts[row]), prompt + chosen
        ids = self.tokens[start:start + end + rejected].tolist()
        return data.Example(ids[:prompt], ids[prompt:end], ids[end:])

    def where(self, i):
        return f"{self.path}, {places(self.path, self.table[self.rows[i], :1].tolist())}"


class Texts(Examples):
    """What the reference is fitted to: (prompt, chosen) of each pair, in tokens."""

    def __getitem__(self, i):
        example = super().__getitem__(i)
        return example.prompt, example.chosen


def read(path, tokenizer, max_length, seed, skip_bad_rows):
    """A user's file in tokens: ({"train": Examples, "held-out": Examples}, left_out).

    The file is read as a stream. left_out, a dict: "bad", as `read_rows` notes it; "equal", the
    lines where chosen is rejected; "train" and "held-out", the lines of pairs with more than
    max_length tokens. "longest" is the most tokens of a pair. "repeated" counts the rows that
    repeat an earlier one. They are not left out.
    """
    tokens = array("H" if tokenizer.n_vocab <= 2 ** 16 else "I")
    table = array("i")
    starts, digests = array("q"), array("q")
    bad, equal = {}, []
    rows = read_rows(path, skip_bad_rows, bad)
    # here a Pair's `where` is the number of its row, and no text: a million texts take 100 MB
    while chunk := [data.Pair(*texts, number) for number, *texts in islice(rows, 100)]:
        usable, same = leave_out_equal(chunk)
        equal += [p.where for p in same]
        for p, e in zip(usable, data.tokenize(usable, tokenizer)[0]):
            table.extend([p.where, len(e.prompt), len(e.chosen), len(e.rejected)])
            starts.append(len(tokens))
            digests.extend([digest(p.prompt), digest(repr([p.prompt, p.chosen, p.rejected]))])
            if len(e) <= max_length:
                tokens.extend(e.prompt + e.chosen + e.rejected)
    table, starts = np.asarray(table).reshape(len(starts), 4), np.asarray(starts)
    digests = np.asarray(digests).reshape(len(starts), 2)
    held_out = hold_out(digests[:, 0], seed, path)
    lengths = table[:, 1] + table[:, 2:].max(1)
    fits = lengths <= max_length
    left_out = {"bad": bad, "equal": equal, "longest": lengths.max(),
                "repeated": int(fits.sum()) - len(np.unique(digests[fits, 1]))}
    sides = {}
    for side, here in (("train", ~held_out), ("held-out", held_out)):
        sides[side] = Examples(path, tokens, table, starts, np.flatnonzero(here & fits))
        left_out[side] = table[here & ~fits, 0].tolist()
        if not len(sides[side]):
            raise data.DataError(f"{path}: no {side} pair is left. {len(left_out[side])} are "
                                 f"longer than --max-length {max_length} tokens. Raise "
                                 "--max-length or bring more pairs.")
    return sides, left_out


def load(path, tokenizer, max_length, seed, skip_bad_rows=False):
    """(SFT texts, examples) of the train side of a user's file, in tokens. Prints what is left out.

    The reference is fitted to the chosen responses, as the paper does (section 4, outline)."""
    sides, left_out = read(path, tokenizer, max_length, seed, skip_bad_rows)
    equal = left_out["equal"]
    counts = [len(sides[side]) + len(left_out[side]) for side in sides]
    print(f"{path}: {sum(counts) + len(equal)} pairs; {counts[0]} to train on, {counts[1]} held "
          "out (by prompt)")
    if left_out["bad"]:
        print(f"Left out: rows that cannot be used\n{list_reasons(path, left_out['bad'])}")
    if equal:
        print(f"Left out: {len(equal)} rows have chosen == rejected and can teach nothing "
              f"({places(path, equal)})")
    for side in sides:
        if left_out[side]:
            print(f"Left out: {len(left_out[side])} {side} pairs are longer than --max-length "
                  f"{max_length} tokens ({places(path, left_out[side])}; the longest of the file "
                  f"has {left_out['longest']})")
    if left_out["repeated"]:
        print(f"Kept: {left_out['repeated']} rows repeat an earlier one; each counts as often as "
              "it stands there")
    train = sides["train"]
    return Texts(**vars(train)), train


def load_init(where, tokenizer, longest):
    """The model that --init names. Raises SystemExit where it does not fit the data."""
    try:
        if str(where).endswith(".pt"):
            model, _ = load_model(where)
        else:
            model = GPT.from_pretrained(where)
    except (ValueError, OSError, RuntimeError) as error:  # the last: sizes that no memory holds
        raise SystemExit(f"--init {where}: {error}") from error
    config = model.config
    if config.vocab_size != tokenizer.n_vocab:
        raise SystemExit(f"--init {where} has {config.vocab_size} tokens, --tokenizer "
                         f"{tokenizer.name} has {tokenizer.n_vocab}: they do not belong together")
    if config.block_size < longest:
        raise SystemExit(f"--init {where} reads {config.block_size} tokens, the longest pair has "
                         f"{longest}: set --max-length {config.block_size}")
    return model


def measure(policy, reference, flags, tokenizer, device):
    """The held-out figures of a run, {name: (mean, standard error)}, and prompts to show.

    Raises DataError where the file has changed since: what was trained on could be held out now.
    """
    if data_sha256(flags["data"]) != flags["data_sha256"]:
        raise data.DataError(f"{flags['data']} has changed since the run was trained on it: "
                             "what is held out is no longer known")
    block = reference.config.block_size
    sides, left_out = read(flags["data"], tokenizer, min(block, flags["max_length"]),
                           flags["seed"], flags.get("skip_bad_rows", False))
    held_out = sides["held-out"]
    lengths = {tokenizer.decode(e.prompt): len(e.prompt) for e in held_out}
    short = [x for x, length in lengths.items() if length < block * 3 // 4]
    prompts = sorted(short)[:64] or [min(lengths, key=lengths.get)]
    room = block - max(lengths[x] for x in prompts)
    unusable = sum(len(numbers) for _, numbers in left_out["bad"].values())
    too_long = len(left_out["train"]) + len(left_out["held-out"])
    summary = {"held_out_pairs": len(held_out), "beta": flags["beta"],
               "left_out": {"unusable": unusable, "equal": len(left_out["equal"]),
                            "too_long": too_long},
               "repeated": left_out["repeated"]}
    summary |= pair_metrics(policy, reference, held_out, flags, device)
    summary |= sample_metrics(policy, reference, prompts, tokenizer, room, device)
    return summary, prompts


@torch.no_grad()
def pair_metrics(policy, reference, examples, flags, device, batch_size=16):
    """Loss, accuracy (a tie counts 1/2) and rewards on held-out pairs."""
    loss_function = LOSSES[flags["loss"]]
    options = {}
    if flags["loss"] in SMOOTHED:
        options["label_smoothing"] = flags["label_smoothing"]
    columns = {"loss": [], "accuracy": [], "chosen_reward": [], "rejected_reward": [],
               "margin": []}
    for i in range(0, len(examples), batch_size):
        some = range(i, min(i + batch_size, len(examples)))
        batch = data.collate([examples[j] for j in some], device=device)
        logps = []
        for model in (policy, reference):
            both = sequence_logps(model, batch["tokens"], batch["response_mask"])  # (2B,)
            logps += both.chunk(2)
        losses, chosen, rejected = loss_function(*logps, flags["beta"], **options)
        accuracy = (chosen > rejected) + 0.5 * (chosen == rejected)
        values = losses, accuracy, chosen, rejected, chosen - rejected
        for column, value in zip(columns.values(), values):
            column.append(value.float().cpu())
    return {name: mean_and_se(torch.cat(column)) for name, column in columns.items()}


@torch.no_grad()
def sample_metrics(policy, reference, prompts, tokenizer, max_new_tokens, device):
    """From one sample for each prompt: KL(policy || reference) in nats a response, its tokens, and
    the share that ended in EOS. The KL is unbiased and never negative: the exact KL of the next
    token, summed over a sample's tokens."""
    eos = tokenizer.eot_token
    columns = {"kl": [], "tokens": [], "ended": []}
    for i in tqdm(range(0, len(prompts), 8), desc="  sample", unit="batch", dynamic_ncols=True):
        ids = [tokenizer.encode_ordinary(x) for x in prompts[i:i + 8]]
        responses = policy.generate(ids, max_new_tokens, eos_id=eos)
        tokens, mask = data.pad(ids, responses)
        tokens, mask = tokens.to(device), mask[:, 1:].to(device)  # (B, T), (B, T-1)
        p = torch.log_softmax(policy(tokens)[:, :-1].float(), -1)  # (B, T-1, V)
        q = torch.log_softmax(reference(tokens)[:, :-1].float(), -1)  # (B, T-1, V)
        kl = (p.exp() * (p - q)).sum(-1)  # (B, T-1)
        columns["kl"] += (kl * mask).sum(-1).tolist()
        columns["tokens"] += [float(len(r)) for r in responses]
        columns["ended"] += [float(r[-1] == eos) for r in responses]
    return {name: mean_and_se(column) for name, column in columns.items()}


# name in the summary: (what it is, what to compare it with)
ROWS = {
    "accuracy": ("preference accuracy (by implicit reward)", "50% by chance"),
    "loss": ("DPO loss, nats", f"ln 2 = {math.log(2):.4f} at the start"),
    "margin": ("reward margin", "0 at the start"),
    "chosen_reward": ("implicit reward of chosen", "0 at the start"),
    "rejected_reward": ("implicit reward of rejected", "0 at the start"),
    "kl": ("KL(policy || reference), nats, sampled", "0 at the start"),
    "tokens": ("tokens a sampled response", ""),
    "ended": ("share that ended in EOS", ""),
}


def table(summary):
    """The closing table of a run on a user's data, text."""
    title = f"held out: {summary['held_out_pairs']} pairs"
    lines = [f"{title:<44}{'mean':>10}{'+- SE':>10}   compare with"]
    for key, (name, reference) in ROWS.items():
        mean, se = summary[key]
        lines.append(f"{name:<44}{mean:>10.3f}{se:>10.3f}   {reference}".rstrip())
    lines.append("left out of the file: {unusable} unusable, {equal} with chosen == rejected, "
                 "{too_long} too long; kept: {repeated} repeated"
                 .format(**summary["left_out"], repeated=summary["repeated"]))
    return "\n".join(lines)
