"""What keeps the mass that plain DPO loses, and why the missing mass costs reward at a small beta.

    python -m lab.remedies DIR DIR DIR     DIR: finished toy runs of train.py, one for each seed

Every policy here begins at a run's reference and sees the run's own pairs in the run's order. The
objective alone differs. The first tables compare remedies at three beta. The last table changes one
thing at a time in the missing mass, at the smallest beta. Results are kept in DIR/remedies.

Predicted before the first full run. The stray mass keeps the most J of all remedies that keep 99 %
of the text well-formed, at each beta. The missing mass costs gain at the smallest beta because its
estimate is noisy: the exact mass removes at least 80 % of the cost, new responses with as much
noise bring back at least 80 % of it, and the bias has a part of less than 20 %. (New responses
brought back half of it. So the bias was put back, too, without the noise and with it.)
"""
import argparse
from functools import lru_cache

import torch
from torch.nn.utils import clip_grad_norm_

import data
import evaluate
import train
import world
from dpo import dpo_loss
from lab import work
from lab.leak import logps_of
from lab.seeds import ROOT
from losses import LIKELY, missing_mass, stray_mass
from model import response_logits, row_logps
from support import command
from support.files import write_json
from support.flags import TOY
from support.likely import LikelyTokens
from support.run import Run, load_toy_run
from support.statistics import mean_and_se

MASS_WEIGHT = 0.15  # of the missing mass
SMALL_BETA = 0.25  # of the last table
DRAWN, RENEWED = 2, 100  # see `Writer`


# ---- How good a policy is

@lru_cache
def rewards_of(side):
    """The true reward of every response to the train prompts (0) or held-out ones (1), (P,N)."""
    return world.rewards(world.prompts()[side], world.responses())


@lru_cache
def reference_of(run, side):
    """The reference's log-probabilities of them, (P,N)."""
    return evaluate.exact_logps(run.reference, world.prompts()[side])


def figures(logps, ref_logps, r, beta):
    """What the tables say of a policy, a dict. logps, ref_logps, r (P,N).

    gain: the share of the reward that can be gained over the reference at the policy's KL. j: J as
    a share of the best J. j_all: the same over all text, an upper bound. estimate_sd: the standard
    deviation of the mean of pi/ref over a batch's responses, drawn from the reference.
    """
    ref = world.normalise(ref_logps)  # (P, N)
    row = evaluate.measure(logps, ref_logps, beta, r)
    start = world.expected(ref, r).mean().item()
    same_kl = world.optimal_policy(ref, r, world.beta_at_kl(ref, r, row["kl"]))  # (P, N)
    best = beta * world.log_partition(ref, r, beta).mean().item()  # J of pi*
    best_all = beta * world.log_partition(*world.with_ill_formed(ref_logps, r), beta).mean().item()
    p = world.normalise(logps)  # (P, N)
    variance = (2 * p - ref).logsumexp(-1).exp() - 1  # (P,): E_ref[(pi/ref)^2] - 1
    return {"gain": (row["reward"] - start) / (world.expected(same_kl, r).mean().item() - start),
            "j": row["objective"] / best, "j_all": row["objective_all"] / best_all,
            "wellformed": row["wellformed"], "kl": row["kl"],
            "estimate_sd": (variance.mean() / (2 * TOY["batch_size"])).sqrt().item()}


def measured(run, policy, beta):
    """`figures` on the train prompts, for choosing, and on the held-out ones, for reporting."""
    out = {}
    for side, name in enumerate(("train", "held_out")):
        logps = evaluate.exact_logps(policy, world.prompts()[side])  # (P, N)
        out[name] = figures(logps, reference_of(run, side), rewards_of(side), beta)
    return out


# ---- Training

@lru_cache(maxsize=3)  # a process does many pieces on three runs
def pairs_of(run):
    """The run's pairs: texts, tokens, and the reference's log-probabilities (N,), (N,)."""
    examples = run.examples("human")
    return (data.make_preferences(run.flags["pairs"], "human", run.seed), examples,
            train.reference_logps(run.reference, examples, 512))


@lru_cache(maxsize=3)
def likely_of(run, least):
    """The tokens to which the reference gives at least `least`, at each beginning of the pairs."""
    likely = LikelyTokens(least)
    train.reference_logps(run.reference, pairs_of(run)[1], 512, likely)
    return likely


def own(run, folder, *, name):
    """A policy of the run itself."""
    return measured(run, run.models[name], run.beta)


def by_train(run, folder, *, beta, stray_weight=0.0, least=LIKELY, nll_weight=0.0):
    """train.train_dpo with other weights."""
    _, examples, ref_logps = pairs_of(run)
    policy, flags = run.new_policy(), run.flags
    train.train_dpo(policy, examples, ref_logps, Run(folder), stage="remedy",
                    likely=likely_of(run, least) if stray_weight else None,
                    stray_weight=stray_weight, nll_weight=nll_weight, beta=beta,
                    **{name: flags[name] for name in ("epochs", "batch_size", "lr", "seed")})
    return measured(run, policy, beta)


def kl_at_tokens(logits, ref_logits):
    """KL(pi||ref) of the next token, over the vocabulary. (N,V), (N,V) -> (N,)"""
    p, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)  # (N, V)
    return (p.exp() * (p - ref)).sum(-1)


def exact_labels(pairs):
    """The probability that the chosen response of each pair is preferred, Eq. 1. (n,)"""
    scores = torch.tensor([[world.true_reward(p.prompt, y) for y in (p.chosen, p.rejected)]
                           for p in pairs], dtype=torch.float64)  # (n, 2)
    return world.preference_prob(*scores.unbind(1)).float()


class Writer:
    """Writes new responses to prompts: with the grammar's probabilities, or with those that the
    policy had RENEWED steps ago or less.

    The mean of pi/writer over its responses is an unbiased estimate of the policy's mass on
    well-formed text. Where the policy is the writer, the ratios are near 1. Then the estimate is
    nearly exact, and its gradient has little noise. A tenth of what this writer writes is the
    grammar's, so that no ratio can be large.
    """

    def __init__(self, who, run, biased):
        """who: "policy" or "grammar". biased: as if the reference had written the grammar's text,
        which is the bias that the run's pairs have."""
        self.who = who
        # a seed of its own: with the run's, the grammar would write the responses of the pairs
        self.generator = torch.Generator().manual_seed(run.seed + 1_000_000)
        self.grammar = self.logps = world.grammar_logps(world.prompts()[0])  # (P, N)
        self.wrong = reference_of(run, 0) - self.grammar if biased else 0 * self.grammar  # (P, N)

    def look(self, step, policy):
        if self.who == "policy" and step % RENEWED == 0:
            p = world.normalise(evaluate.exact_logps(policy, world.prompts()[0])).exp()  # (P, N)
            self.logps = (0.9 * p + 0.1 * self.grammar.exp()).log()  # (P, N)

    def missing_mass(self, policy, tokenizer, prompt):
        """losses.missing_mass from new responses to prompts with the numbers (n,): one for each,
        or DRAWN where the policy writes."""
        prompt = prompt.repeat(DRAWN if self.who == "policy" else 1)
        response = data.draw(self.logps, prompt, self.generator)  # (n,)
        logps = logps_of(policy, tokenizer, prompt, response)  # (n,)
        return missing_mass(logps, (self.logps + self.wrong)[prompt, response].float())


WRITERS = {"missing mass, exact": "policy", "missing mass, new responses": "grammar"}


def fit(run, folder, *, beta, add="nothing", weight=0.0, labels="drawn", biased=False):
    """Eq. 7 plus `weight` times the term that `add` names. labels: "drawn", as the pairs have them,
    or "exact". biased: see `Writer`. What it returns says, too, how the term varied over the last
    fifth of the steps."""
    pairs, examples, (ref_chosen, ref_rejected) = pairs_of(run)
    policy, flags = run.new_policy().eval(), run.flags
    prompts, texts = world.prompts()[0], world.responses()
    prompt_number = {text: i for i, text in enumerate(prompts)}
    prompt = torch.tensor([prompt_number[pair.prompt] for pair in pairs])  # (n,)
    if labels == "exact":
        p = exact_labels(pairs)  # (n,)
    if add == "missing mass, the grammar's probabilities":
        number, grammar = {text: i for i, text in enumerate(texts)}, world.grammar_logps(prompts)
        written = [grammar[prompt, [number[getattr(pair, side)] for pair in pairs]].float()
                   for side in ("chosen", "rejected")]  # (n,), (n,)
    if add == "stray mass":
        likely = likely_of(run, LIKELY)
    if add in WRITERS:
        writer = Writer(WRITERS[add], run, biased)
    optimizer, record, term, terms = train.adamw(policy, flags["lr"]), Run(folder), None, []
    # What an interrupted training has saved lacks the writer. It takes a minute, so it begins anew.
    record.state.unlink(missing_ok=True)
    plan = data.epochs([len(e) for e in examples], flags["batch_size"], run.seed, flags["epochs"])
    for step, [(_, indices)] in record.steps("remedy", policy, optimizer, plan):
        batch = data.collate([examples[i] for i in indices])
        logits, targets, row = response_logits(policy, **batch)  # (n, V), (n,), (n,)
        logps = row_logps(logits, targets, row, 2 * len(indices))  # (2B,)
        (chosen, rejected), ref = logps.chunk(2), (ref_chosen[indices], ref_rejected[indices])
        losses, *_ = dpo_loss(chosen, rejected, *ref, beta)  # (B,)
        if labels == "exact":  # each of the two may be the preferred one
            turned, *_ = dpo_loss(rejected, chosen, *ref[::-1], beta)  # (B,)
            losses = p[indices] * losses + (1 - p[indices]) * turned  # (B,)
        total = losses.mean()
        if add == "stray mass":
            term = stray_mass(logits, likely.mask(indices)).sum() / len(logps)
        elif add == "KL":
            with torch.no_grad():
                ref_logits, *_ = response_logits(run.reference, **batch)  # (n, V)
            term = kl_at_tokens(logits, ref_logits).sum() / len(logps)  # a mean over responses
        elif add == "missing mass":
            term = missing_mass(logps, torch.cat(ref))
        elif add == "missing mass, the grammar's probabilities":
            term = missing_mass(logps, torch.cat([side[indices] for side in written]))
        elif add in WRITERS:
            writer.look(step, policy)
            term = writer.missing_mass(policy, run.tokenizer, prompt[indices].repeat(2))
        elif add != "nothing":
            raise ValueError(f"add={add!r} is not known here")
        if term is not None:
            total = total + weight * term
            terms.append(term.item())
        total.backward()
        record.log(loss=total, grad_norm=clip_grad_norm_(policy.parameters(), train.CLIP))
        optimizer.step()
        optimizer.zero_grad()
    out = measured(run, policy, beta)
    last = torch.tensor(terms[-(len(plan) // 5):])
    return out | ({"term": [last.mean().item(), last.std(correction=0).item()]} if terms else {})


# ---- What is trained

def pieces():
    """{table: {row: Piece}}. A table for each beta, and "why"."""
    likelihood = "likelihood of the chosen (RPO), {:g}"
    every = {
        "nothing: plain DPO": (by_train, {}),
        "missing mass, 0.15": (fit, {"add": "missing mass", "weight": MASS_WEIGHT}),
        "stray mass, 0.3": (by_train, {"stray_weight": 0.3}),
        "stray mass, 1": (by_train, {"stray_weight": 1.0}),
        "stray mass, 3": (by_train, {"stray_weight": 3.0}),
        "stray mass, 1, below 0.1 %": (by_train, {"stray_weight": 1.0, "least": 0.001}),
        "stray mass, 1, below 3 %": (by_train, {"stray_weight": 1.0, "least": 0.03}),
        "KL at the pairs' tokens, 0.03": (fit, {"add": "KL", "weight": 0.03}),
        "KL at the pairs' tokens, 0.1": (fit, {"add": "KL", "weight": 0.1}),
        likelihood.format(0.02): (by_train, {"nll_weight": 0.02}),
        likelihood.format(0.05): (by_train, {"nll_weight": 0.05})}
    few = ["nothing: plain DPO", "missing mass, 0.15", "stray mass, 1", "stray mass, 3",
           likelihood.format(0.05)]
    out = {}
    for beta in (1.0, 0.5, SMALL_BETA):
        out[f"beta {beta:g}"] = table = {}
        for row in every if beta == 1 else few:
            function, settings = every[row]
            table[row] = piece(f"beta {beta:g}", row, function, beta=beta, **settings)
    # the run itself has trained two of them
    for row, name in (("nothing: plain DPO", "plain"), ("stray mass, 1", "dpo")):
        out["beta 1"][row] = piece("beta 1", row, own, name=name)
    why = {f"missing mass, {how}": {"add": f"missing mass, {how}", "weight": MASS_WEIGHT}
           for how in ("exact", "new responses", "the grammar's probabilities")}
    why |= {f"{row}, biased": why[row] | {"biased": True} for row in WRITERS}
    why["exact labels, nothing added"] = {"labels": "exact"}
    why["exact labels, stray mass, 1"] = {"labels": "exact", "add": "stray mass", "weight": 1.0}
    small = out[f"beta {SMALL_BETA:g}"]
    out["why"] = {row: small[row] for row in few[:3]} | {
        row: piece("why", row, fit, beta=SMALL_BETA, **settings) for row, settings in why.items()}
    return out


def piece(table, row, function, **settings):
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in f"{table} {row}")
    return work.Piece(f"remedies/{name}", function, settings)


# ---- What was found

COLUMNS = {"gain": "gain, %", "wellformed": "well-formed, %", "j": "J, %", "j_all": "J, all, %"}


def gather(folders):
    """{table: {row: {"train" or "held_out": {figure: a number for each run}, "term": [mean,
    standard deviation] for each run, where there is a term}}}"""
    out = {}
    for table, rows in pieces().items():
        out[table] = {}
        for row, one in rows.items():
            found = [work.result(folder, one.name) for folder in folders]
            out[table][row] = kept = {side: {name: [each[side][name] for each in found]
                                             for name in found[0][side]}
                                      for side in ("train", "held_out")}
            if "term" in found[0]:
                kept["term"] = [each["term"] for each in found]
    return out


def removed(rows, row, figure="gain"):
    """How much of what the missing mass costs at SMALL_BETA is not lost in a row, a share."""
    def mean(name):
        return mean_and_se(rows[name]["held_out"][figure])[0]
    worst = mean("missing mass, 0.15")
    return (mean(row) - worst) / (mean("nothing: plain DPO") - worst)


def text_of(found):
    """The tables, for a terminal."""
    lines = []
    for table, rows in found.items():
        head = f"beta {SMALL_BETA:g}, why" if table == "why" else table
        lines.append(f"\n{head:<44}" + "".join(f"{title:>16}" for title in COLUMNS.values())
                     + f"{'J, train, %':>16}" + ("  removed, %" if table == "why" else ""))
        for row, sides in rows.items():
            cells = [sides["held_out"][name] for name in COLUMNS] + [sides["train"]["j"]]
            line = f"{row:<44}"
            for values in cells:
                mean, error = mean_and_se([100 * value for value in values])
                line += f"{mean:>9.1f} ± {error:4.1f}"
            if table == "why":
                line += f"{round(100 * removed(rows, row)):>12}"
            lines.append(line)
    lines.append("\nHeld-out prompts but for the last J. Mean ± standard error over the runs.")
    return "\n".join(lines)


def check(folder):
    """Raises SystemExit unless the folder holds a finished run with the default objective."""
    flags, _, _ = load_toy_run(folder)
    for name, value in TOY.items():
        if flags.get(name) != value:
            raise SystemExit(f"{folder} was trained with {name} = {flags.get(name)}; this needs "
                             f"runs with the default value, {value}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", nargs="+", help="folders of finished toy runs of train.py")
    parser.add_argument("--record", action="store_true",
                        help="write what was found to docs/remedies.json, which a page quotes")
    args = parser.parse_args(argv)
    for folder in args.dirs:
        check(folder)  # before anything is trained
    every = {one.name: one for rows in pieces().values() for one in rows.values()}
    work.do(every.values(), args.dirs)
    found = gather(args.dirs)
    if args.record:
        write_json(found, ROOT / "docs" / "remedies.json")
    print(text_of(found))


if __name__ == "__main__":
    command.run(main, again="The same command goes on with what is missing.")
