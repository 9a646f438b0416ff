"""Why does plain DPO write text outside the grammar? Each piece of work here changes one thing.

    python -m lab.leak DIR [DIR ...]     DIR: finished toy runs of train.py, one for each seed

A policy leaks where it gives probability to text that is not well-formed. The runs' own plain DPO
leaks. Here it is trained again with other labels, another optimizer, another width, with a table in
the place of the transformer, and at last with a transformer that shares less. A table has free
logits for each beginning of a response, and so nothing that one beginning learns is known to
another. Tables whose beginnings share their logits show what the sharing does. A transformer that
shares less has weights of its own at some places. Results are kept in DIR/leak.
"""
import argparse
import copy
from functools import lru_cache

import torch
import torch.nn as nn
from torch.nn.utils import clip_grad_norm_

import data
import evaluate
import train
import world
from dpo import dpo_loss
from lab import work
from lab.credit import toy_sequences
from lab.seeds import ROOT
from model import GPT, GPTConfig, sequence_logps
from support import command, flags, toy_data
from support.files import write_json
from support.run import Run, load_toy_run

STEPS, BATCH = 1250, 64  # as many as the default run has


# ---- Pairs, drawn as data.make_preferences draws them, and their exact labels

def draw_pairs(n, which, seed):
    """n pairs for the train prompts with the numbers `which`: prompts, first, second (n,), which
    are numbers, and the probability that the first one is preferred (n,)."""
    prompts, texts = world.prompts()[0], world.responses()
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.tensor(which)[torch.arange(n) % len(which)]  # (n,)
    logps = world.grammar_logps(prompts)  # (P, N)
    first, second = [data.draw(logps, prompt, generator) for _ in range(2)]  # (n,), (n,)
    while (same := first == second).any():
        second[same] = data.draw(logps, prompt[same], generator)
    scores = world.rewards(prompts, texts)  # (P, N)
    p = world.preference_prob(scores[prompt, first], scores[prompt, second])  # (n,)
    return prompt, first, second, p.float()


@lru_cache
def tokens_of(tokenizer):
    """The tokens of every train prompt, and those of every response with its EOS: two lists."""
    return [tokenizer.encode_ordinary(x) for x in world.prompts()[0]], toy_sequences()


def logps_of(policy, tokenizer, prompt, response):
    """log pi(y|x), for numbers of prompts and of responses (n,) each -> (n,)"""
    prompts, responses = tokens_of(tokenizer)
    tokens, mask = data.pad([prompts[x] for x in prompt.tolist()],
                            [responses[y] for y in response.tolist()])
    return sequence_logps(policy, tokens, mask)


# ---- Where a policy leaves the grammar

class Beginnings:
    """The K different beginnings of the N responses; the empty one is the first.

    token (N,T): the responses, padded. index (N,T): the beginning before each token. inside (N,T)
    is false on padding. place (K,): a place, a number below N T, where a beginning stands.
    may_follow (K,V): the tokens with which a response goes on. names: the beginnings, tuples.
    """

    def __init__(self, responses, vocab):
        self.token, self.inside = data.pad([[]] * len(responses), responses)  # (N, T), (N, T)
        numbers, place, T = {}, [], self.token.size(1)
        self.index = torch.zeros_like(self.token)
        for i, response in enumerate(responses):
            for t in range(len(response)):
                beginning = tuple(response[:t])
                if beginning not in numbers:
                    numbers[beginning] = len(place)
                    place.append(i * T + t)
                self.index[i, t] = numbers[beginning]
        self.names, self.place = list(numbers), torch.tensor(place)
        self.may_follow = torch.zeros(len(place), vocab, dtype=torch.bool)
        self.may_follow[self.index[self.inside], self.token[self.inside]] = True

    def reached(self, next_logps):
        """The probability that a policy comes to each beginning, (K,). next_logps (K,V)."""
        logps = torch.where(self.inside, next_logps[self.index, self.token], 0.0)  # (N, T)
        before = logps.cumsum(1) - logps  # (N, T)
        return before.flatten()[self.place].exp()


@lru_cache
def beginnings(tokenizer):
    return Beginnings(tokens_of(tokenizer)[1], tokenizer.n_vocab)


@torch.no_grad()
def next_logps(model, tokenizer, prompt_ids):
    """log pi(token | prompt, beginning) at each beginning of a response, (K,V)."""
    b = beginnings(tokenizer)
    N, T = b.token.shape
    prompt = torch.tensor(prompt_ids).expand(N, -1)  # (N, P)
    states = model.hidden(torch.cat([prompt, b.token], 1)[:, :-1])  # (N, P+T-1, C)
    states = states[:, len(prompt_ids) - 1:].flatten(0, 1)[b.place]  # (K, C)
    return model.head(states).log_softmax(-1)


def place_of(text):
    """What a beginning ends with: its modifier, and "..." for an adjective. A text."""
    text = text.replace(", but", " and").split(" and")[-1]  # the half that is being written
    for adjective in world.VALENCE:
        text = text.replace(adjective, " ...")
    return text.strip() or "a half begins"


def exits(next_logps, tokenizer):
    """Where mass leaves the grammar: {place: [mass that comes there, mass that leaves there]}."""
    b = beginnings(tokenizer)
    reached = b.reached(next_logps)  # (K,)
    stays = torch.where(b.may_follow, next_logps.exp(), 0.0).sum(-1)  # (K,)
    out = {}
    for name, comes, leaves in zip(b.names, reached.tolist(), (reached * (1 - stays)).tolist()):
        row = out.setdefault(place_of(tokenizer.decode(list(name))), [0.0, 0.0])
        row[0] += comes
        row[1] += leaves
    return out


# ---- A policy for one prompt that is a table

class Table(nn.Module):
    """Logits for each key. key(beginning), of a tuple of tokens, says which beginnings of a
    response share their logits. It begins as the reference, or as near to it as the keys allow."""

    def __init__(self, ref_next, tokenizer, key):
        """ref_next (K,V): the reference's, from `next_logps`."""
        super().__init__()
        self.b = b = beginnings(tokenizer)
        keys = [key(name) for name in b.names]
        numbers = {k: i for i, k in enumerate(dict.fromkeys(keys))}
        self.row = torch.tensor([numbers[k] for k in keys])  # (K,)
        # a beginning counts as often as the reference comes there
        weighted = b.reached(ref_next)[:, None] * ref_next.exp()  # (K, V)
        mean = weighted.new_zeros(len(numbers), ref_next.size(1)).index_add(0, self.row, weighted)
        self.logits = nn.Parameter((mean / mean.sum(-1, keepdim=True)).log())  # (keys, V)

    def next_logps(self):
        return self.logits.log_softmax(-1)[self.row]  # (K, V)

    def forward(self, response):
        """log pi(y) of responses, numbers (n,) -> (n,)"""
        b, at = self.b, self.row[self.b.index[response]]  # (n, T)
        logps = self.logits[at].log_softmax(-1).gather(2, b.token[response, :, None])  # (n, T, 1)
        return torch.where(b.inside[response], logps[:, :, 0], 0.0).sum(1)


def keys(tokenizer):
    """Which beginnings of a response share their logits: functions from a beginning to a key."""
    very, no, *connectives = [tokenizer.encode_ordinary(word)[0]
                              for word in (" very", " not", " and", ",")]

    def half(y):
        """The tokens of the half that is being written, with its connective."""
        at = [i for i, token in enumerate(y) if token in connectives]
        return y[at[0]:] if at else y

    def alike(y):
        """The beginning, with "very" for "not very" at its end."""
        return (*y[:-2], very) if y[-2:] == (no, very) else y

    return {"no logits": lambda y: y, "the two halves": half, "very and not very": alike,
            "both": lambda y: alike(half(y))}


# ---- A transformer that shares less

PARTS = {"attention": lambda gpt, x: gpt.h[0].attn(gpt.h[0].ln_1(x))[0],
         "MLP": lambda gpt, x: gpt.h[0].mlp(gpt.h[0].ln_2(x)),
         "head": lambda gpt, x: gpt.head(gpt.ln_f(x))}


class Untied(nn.Module):
    """A GPT of one layer in which some parts have weights of their own at some places.

    It begins as the GPT. place(beginning), of a tuple of tokens, names a place of the response, or
    is None. At each of the `names` the `parts`, names in PARTS, are those of a copy. All prompts
    have prompt_length tokens. `hidden` returns logits already, and `head` changes nothing.
    """

    def __init__(self, gpt, prompt_length, place, names, parts):
        super().__init__()
        if len(gpt.h) != 1:
            raise ValueError(f"the model has {len(gpt.h)} layers; this is made for one")
        self.gpt, self.head, self.parts = copy.deepcopy(gpt), nn.Identity(), parts
        self.copies = nn.ModuleList(copy.deepcopy(gpt) for _ in names)
        self.prompt_length, self.place = prompt_length, place
        self.number = {name: i for i, name in enumerate(names)}
        self.known = {}  # the places of each row of tokens

    def places(self, tokens):
        """The number of the place where each token stands, -1 where it is none. (B,T) -> (B,T)"""
        out, start = [], self.prompt_length
        for row in map(tuple, tokens.tolist()):
            if row not in self.known:
                self.known[row] = [self.number.get(self.place(row[start:t + 1]), -1)
                                   if t >= start - 1 else -1 for t in range(len(row))]
            out.append(self.known[row])
        return torch.tensor(out)

    def part(self, name, x, at):
        """A part's output for x (B,T,C), with the copies' outputs at their places."""
        part = PARTS[name]
        y = part(self.gpt, x)  # (B, T, C), or (B, T, V)
        if name not in self.parts:
            return y
        for i in at[at >= 0].unique().tolist():
            here = at == i  # (B, T)
            # attention looks at the other tokens, too
            own = (part(self.copies[i], x)[here] if name == "attention"
                   else part(self.copies[i], x[here]))  # (n, C), or (n, V)
            y = y.masked_scatter(here[..., None], own)
        return y

    def hidden(self, tokens, needed=None):
        at = self.places(tokens)  # (B, T)
        x = self.gpt.wte(tokens) + self.gpt.wpe(torch.arange(tokens.size(1)))  # (B, T, C)
        x = x + self.part("attention", x, at)
        x = x + self.part("MLP", x, at)
        return self.part("head", x, at)  # (B, T, V)


def own_places(tokenizer):
    """Functions from a beginning to the name of its place, or None, and all the names."""
    very, no = [tokenizer.encode_ordinary(word)[0] for word in (" very", " not")]
    adjectives = {tokenizer.encode_ordinary(word)[0] for word in world.VALENCE}
    half = keys(tokenizer)["the two halves"]

    def not_very(y):
        return "not very" if y[-2:] == (no, very) else None

    def modifiers(y):
        """What the half begins with, connective and modifiers, as long as it has no adjective."""
        return None if adjectives & set(half(y)) else half(y)

    begins = dict.fromkeys(modifiers(y) for y in beginnings(tokenizer).names)
    return {"not very": (not_very, ["not very"]),
            "each modifier": (modifiers, [name for name in begins if name is not None])}


# ---- The pieces of work

def fit(name, run, folder, parameters, logps, pairs, optimizer, soft=False):
    """Minimise Eq. 7, from the reference. logps(prompt, response): log pi of numbers (n,) -> (n,).
    soft: the expected loss over a pair's labels, in the place of one label, drawn at random."""
    prompt, first, second, p = pairs
    with torch.no_grad():
        ref = torch.cat([logps(prompt[i:i + 500], y[i:i + 500]) for y in (first, second)
                         for i in range(0, len(prompt), 500)]).view(2, -1)  # (2, n)
    generator = torch.Generator().manual_seed(run.seed)
    wins = (torch.rand(len(p), generator=generator) < p).float()  # (n,)
    plan = data.epochs([1] * len(p), BATCH, run.seed, n=STEPS * BATCH // len(p))
    recorded = Run(folder)
    for _, [(_, i)] in recorded.steps(name, parameters, optimizer, plan):
        one, other = logps(prompt[i].repeat(2), torch.cat([first[i], second[i]])).chunk(2)
        won = dpo_loss(one, other, *ref[:, i], run.beta)[0]
        lost = dpo_loss(other, one, *ref[:, i].flip(0), run.beta)[0]
        target = (p if soft else wins)[i]
        loss = (target * won + (1 - target) * lost).mean()
        loss.backward()
        recorded.log(loss=loss)
        clip_grad_norm_(parameters.parameters(), train.CLIP)
        optimizer.step()
        optimizer.zero_grad()


def result(run, which, ref, logps, places):
    """What a policy has come to, on the train prompts with the numbers `which`. ref, logps (P,N).
    places: `exits` of the reference and of the policy, for the first of the prompts."""
    prompts = [world.prompts()[0][x] for x in which]
    reward = world.rewards(prompts, world.responses())  # (P, N)
    row = evaluate.measure(logps, ref, run.beta, reward)
    normal = world.normalise(ref)  # (P, N)
    star = world.optimal_policy(normal, reward, run.beta)  # (P, N)
    best = evaluate.measure(star, ref, run.beta, reward)
    return {"wellformed": row["wellformed"], "share_of_j": row["objective"] / best["objective"],
            "exits": places}


def optimizer_of(kind, parameters, lr):
    if kind == "sgd":
        return torch.optim.SGD(parameters.parameters(), lr, momentum=0.9)
    return train.adamw(parameters, lr)


def transformer(run, folder, prompts="all", soft=False, fresh=False, optimizer="adam", lr=1.5e-3,
                width=None):
    """Plain DPO on the run's reference, or on a reference of another width.

    prompts: "all" of the train prompts, or "one". fresh: no pair is seen twice."""
    which = list(range(24)) if prompts == "all" else [run.seed]
    pairs = draw_pairs(STEPS * BATCH // (1 if fresh else 2), which, run.seed)
    reference = run.reference if width is None else another_reference(run, folder, width)
    policy = copy.deepcopy(reference).requires_grad_(True)

    def logps(prompt, response):
        return logps_of(policy, run.tokenizer, prompt, response)

    fit("leak", run, folder, policy, logps, pairs, optimizer_of(optimizer, policy, lr), soft)
    texts = [world.prompts()[0][x] for x in which]
    ids = run.tokenizer.encode_ordinary(texts[0])
    places = [exits(next_logps(model, run.tokenizer, ids), run.tokenizer)
              for model in (reference, policy)]
    ref, logps = [evaluate.exact_logps(model, texts) for model in (reference, policy)]
    return result(run, which, ref, logps, places)


def table(run, folder, shared, soft=False, lr=0.03):
    """Plain DPO for one prompt, on a table. shared: a name in `keys`."""
    which, tokenizer = [run.seed], run.tokenizer
    ids = tokenizer.encode_ordinary(world.prompts()[0][run.seed])
    policy = Table(next_logps(run.reference, tokenizer, ids), tokenizer, keys(tokenizer)[shared])
    pairs = draw_pairs(STEPS * BATCH // 2, which, run.seed)
    everything = torch.arange(len(world.responses()))

    @torch.no_grad()
    def now():
        return policy(everything).double()[None], exits(policy.next_logps(), tokenizer)

    ref, place = now()
    fit("leak", run, folder, policy, lambda _, response: policy(response), pairs,
        optimizer_of("adam", policy, lr), soft)
    logps, place_after = now()
    return result(run, which, ref, logps, [place, place_after])


def untied(run, folder, where, parts, lr=1.5e-3):
    """Plain DPO for one prompt, on a transformer that shares less. where: a key of `own_places`."""
    which, tokenizer = [run.seed], run.tokenizer
    ids = tokenizer.encode_ordinary(world.prompts()[0][run.seed])
    place, names = own_places(tokenizer)[where]
    policy = Untied(run.reference, len(ids), place, names, parts).requires_grad_(True)
    pairs, b = draw_pairs(STEPS * BATCH // 2, which, run.seed), beginnings(tokenizer)

    def now():
        after = next_logps(policy, tokenizer, ids)  # (K, V)
        logps = torch.where(b.inside, after[b.index, b.token], 0.0).sum(1)  # (N,)
        return logps.double()[None], exits(after, tokenizer)

    def logps(prompt, response):
        return logps_of(policy, tokenizer, prompt, response)

    ref, exits_before = now()
    fit("leak", run, folder, policy, logps, pairs, optimizer_of("adam", policy, lr))
    after, exits_after = now()
    return result(run, which, ref, after, [exits_before, exits_after])


def another_reference(run, folder, width):
    """A reference as train.py makes it, with another number of channels."""
    torch.manual_seed(run.seed)
    texts, _ = toy_data.load(run.tokenizer, train.SFT_TEXTS, 1, "human", run.seed)
    model = GPT(GPTConfig(64, run.tokenizer.n_vocab, 1, n_head=width // 32, n_embd=width))
    train.train_sft(model, texts, Run(folder), epochs=1, batch_size=train.SFT_BATCH,
                    lr=flags.TOY["sft_lr"], seed=run.seed)
    return model.eval().requires_grad_(False)


def pieces():
    def one(name, function, **settings):
        return work.Piece(f"leak/{name}", function, settings)

    out = [one("plain", transformer),
           one("exact labels, no pair twice", transformer, soft=True, fresh=True),
           one("SGD", transformer, optimizer="sgd", lr=0.05),
           one("a third of the step size", transformer, lr=5e-4),
           one("one prompt", transformer, prompts="one"),
           one("one prompt, exact labels", transformer, prompts="one", soft=True, fresh=True)]
    out += [one(f"{width} channels", transformer, width=width) for width in (32, 128, 256)]
    for shared in ("no logits", "the two halves", "very and not very", "both"):
        out.append(one(f"a table, {shared}", table, shared=shared))
        out.append(one(f"a table, {shared}, exact labels", table, shared=shared, soft=True))
    for parts in (["attention"], ["MLP"], ["head"], list(PARTS)):
        out.append(one(f"one prompt, not very has its own {', '.join(parts)}", untied,
                       where="not very", parts=parts))
    out.append(one("one prompt, each modifier has its own MLP, head", untied,
                   where="each modifier", parts=["MLP", "head"]))
    return out


def gather(folders):
    """{what is trained: {"wellformed", "share_of_j": a number for each run; "exits": for the first
    prompt of the first run, the three places where most mass leaves: {place: [the reference comes
    there, the policy comes there, mass that leaves]}}}"""
    out = {}
    for piece in pieces():
        rows = [work.result(folder, piece.name) for folder in folders]
        ref, policy = rows[0]["exits"]
        most = sorted(policy, key=lambda place: -policy[place][1])[:3]
        out[piece.name.removeprefix("leak/")] = {
            "wellformed": [row["wellformed"] for row in rows],
            "share_of_j": [row["share_of_j"] for row in rows],
            "exits": {place: [ref[place][0], *policy[place]] for place in most}}
    return out


def table_of(found):
    """What was found, text: a line for each policy, with the places where most mass leaves."""
    lines = [f"{'what is trained':<42}{'well-formed, %':>20}{'J, % of the best':>20}"]
    for name, row in found.items():
        cells = [" ".join(f"{100 * value:5.1f}" for value in row[key])
                 for key in ("wellformed", "share_of_j")]
        lines.append(f"{name:<42}{cells[0]:>20}{cells[1]:>20}")
        lines.append("    leaves after " + ", ".join(
            f"'{place}' {leaves:.1%}" for place, (_, _, leaves) in row["exits"].items()))
    lines.append("\nA number for each run, on train prompts, exact. The mass that leaves is that "
                 "of the first\nrun's first prompt. '...' stands for an adjective.")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", nargs="+", help="folders of finished toy runs of train.py")
    parser.add_argument("--record", action="store_true",
                        help="write what was found to docs/leak.json, which a page quotes")
    args = parser.parse_args(argv)
    for folder in args.dirs:
        load_toy_run(folder)  # says what is wrong with it, before anything is trained
    work.do(pieces(), args.dirs)
    found = gather(args.dirs)
    if args.record:
        write_json(found, ROOT / "docs" / "leak.json")
    print("\n" + table_of(found))


if __name__ == "__main__":
    command.run(main, again="The same command goes on with what is missing.")
