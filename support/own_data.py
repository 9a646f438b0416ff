"""A user's own pairs: loading them for train.py, and measuring on what was held out.

Nobody can list all responses here. So figures come from held-out pairs and from samples.
"""
import math

import torch
from tqdm import tqdm

import data
from losses import LOSSES, SMOOTHED
from model import GPT, sequence_logps
from support.checkpoints import load_model
from support.preferences import split
from support.run import data_sha256
from support.statistics import mean_and_se


def load(path, tokenizer, max_length, seed):
    """(SFT texts, examples) of the train side of a user's file, in tokens. Prints what is left out.

    The reference is fitted to the chosen responses, as the paper does (section 4, outline)."""
    pairs = data.load_preferences(path)
    train, held_out, equal = split(pairs, seed)
    print(f"{path}: {len(pairs)} pairs; {len(train)} to train on, {len(held_out)} held out "
          "(by prompt)")
    if equal:
        print(f"Left out: {len(equal)} rows have chosen == rejected and can teach nothing "
              f"({places(equal)})")
    kept = {}
    for name, side in (("train", train), ("held-out", held_out)):
        kept[name], too_long = data.tokenize(side, tokenizer, max_length)
        if too_long:
            print(f"Left out: {len(too_long)} {name} pairs are longer than --max-length "
                  f"{max_length} tokens ({places(too_long)})")
        if not kept[name]:
            raise data.DataError(f"{path}: no {name} pair is left. Raise --max-length or bring "
                                 "more pairs.")
    texts = [(e.prompt, e.chosen) for e in kept["train"]]
    return texts, kept["train"]


def places(pairs):
    """Where the first of some pairs stands."""
    return pairs[0].where + (", ..." if len(pairs) > 1 else "")


def load_init(where, tokenizer, longest):
    """The model that --init names. Raises SystemExit where it does not fit the data."""
    try:
        if str(where).endswith(".pt"):
            model, _ = load_model(where)
        else:
            model = GPT.from_pretrained(where)
    except (ValueError, OSError) as error:
        raise SystemExit(f"--init: {error}") from error
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
    pairs = data.load_preferences(flags["data"])
    _, held_out, _ = split(pairs, flags["seed"])
    block = reference.config.block_size
    examples, _ = data.tokenize(held_out, tokenizer, block)
    lengths = {p.prompt: len(tokenizer.encode_ordinary(p.prompt)) for p in held_out}
    prompts = sorted(x for x, length in lengths.items() if length < block * 3 // 4)[:64]
    room = block - max(lengths[x] for x in prompts)
    summary = {"held_out_pairs": len(examples), "beta": flags["beta"]}
    summary |= pair_metrics(policy, reference, examples, flags, device)
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
        batch = data.collate(examples[i:i + batch_size], device=device)
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
    return "\n".join(lines)
