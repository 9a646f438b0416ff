"""What a person looks at: the closing table of a toy run, and answers side by side."""
import textwrap

import world

NAMES = {"sft": "reference", "plain": "plain DPO", "dpo": "DPO", "ppo": "PPO"}
# The colours of Okabe and Ito. Colour-blind readers can tell them apart, and so can a reader of a
# grey print. The same thing has the same colour in every figure.
COLOURS = {"reference": "#000000", "dpo": "#0072B2", "plain": "#D55E00", "optimum": "#009E73",
           "rejected": "#CC79A7", "limit": "#999999"}
TITLES = {"reference": "reference (SFT)", "plain": "plain DPO (Eq. 7 alone)", "dpo": "DPO",
          "same_kl": "optimum at DPO's KL", "same_beta": "optimum at the same beta"}

COLUMNS = ("reward", "kl", "objective", "win_rate", "wellformed", "objective_all")


def table(rows):
    """Measurements of policies on the held-out prompts, text. rows: {title: evaluate.measure}."""
    lines = [f"{'held-out prompts':<26}{'true reward':>12}{'KL, nats':>10}{'J':>8}"
             f"{'win rate':>10}{'well-formed':>13}{'J, all text':>13}"]
    for title, row in rows.items():
        reward, kl, objective, win_rate, wellformed, objective_all = [row[c] for c in COLUMNS]
        lines.append(f"{title:<26}{reward:>12.3f}{kl:>10.3f}{objective:>8.3f}"
                     f"{win_rate:>10.1%}{wellformed:>13.1%}{objective_all:>13.3f}")
    return "\n".join(lines)


# Every number of the closing table has one name in a run's summary.
KEYS = {"reference": "ref_{}", "plain": "plain_{}", "dpo": "policy_{}",
        "same_kl": "optimal_{}_same_kl", "same_beta": "optimal_{}_same_beta"}
SHORT = {("dpo", "objective"): "objective", ("dpo", "objective_all"): "objective_all",
         ("dpo", "win_rate"): "win_rate", ("same_beta", "objective"): "objective_optimal"}


def summary_key(row, column):
    """The name that a number of the table has in the summary."""
    return SHORT.get((row, column), KEYS[row].format(column))


def toy_table(s):
    """The closing table of a toy run, text, from its summary s: a row for each policy, means over
    held-out prompts."""
    rows = {}
    for row, title in TITLES.items():
        if summary_key(row, "reward") in s:
            rows[title] = {column: s[summary_key(row, column)] for column in COLUMNS}
    lines = [table(rows)]
    share = s["objective"] / s["objective_optimal"]
    share_all = s["objective_all"] / s["objective_all_optimal"]
    lines += ["",
              f"beta = {s['beta']:g}. True reward, KL to the reference and J = E[r*] - beta KL are "
              "over well-formed text.",
              "Win rate (against a sample of the reference, a tie counts 1/2) and \"J, all text\" "
              f"count ill-formed text at {world.ILL_FORMED_REWARD:g}.",
              "All is exact, but for \"J, all text\" of a trained policy: it is an upper bound.",
              "",
              f"DPO reaches {s['captured']:.1%} of the gain in reward that is possible at its KL.",
              f"Its J is {share:.1%} of the optimum, and with ill-formed text at most "
              f"{share_all:.1%}."]
    if "plain_captured" in s:
        lines.append(f"Plain DPO reaches {s['plain_captured']:.1%} with its well-formed text, but "
                     f"{1 - s['plain_wellformed']:.1%} of its text is ill-formed.")
    return "\n".join(lines)


# ---- Text side by side

def side_by_side(columns, width=46):
    """columns: [(heading, [text, ...]), ...] -> the texts beside each other, wrapped."""
    lines = ["".join(f"{heading:<{width}}" for heading, _ in columns).rstrip(),
             "-" * (width * len(columns) - 2)]
    for texts in zip(*(texts for _, texts in columns)):
        wrapped = []
        for text in texts:
            text = " ".join(text.split()) or "(empty)"
            wrapped.append(textwrap.wrap(text, width - 2))
        for i in range(max(map(len, wrapped))):
            cells = [w[i] if i < len(w) else "" for w in wrapped]
            lines.append("".join(f"{cell:<{width}}" for cell in cells).rstrip())
    return "\n".join(lines)


def sample_answers(model, tokenizer, prompt, n, temperature=1.0, max_new_tokens=64):
    """n sampled answers to a prompt, texts. " ..." marks an answer that did not end."""
    ids, eos = tokenizer.encode_ordinary(prompt), tokenizer.eot_token
    room = model.config.block_size - len(ids)
    if not ids or room < 1:
        raise SystemExit(f"--prompt has {len(ids)} tokens; this model reads 1 to "
                         f"{model.config.block_size - 1}")
    out = model.generate([ids] * n, min(max_new_tokens, room), temperature, eos_id=eos)
    texts = []
    for ids in out:
        ended = ids[-1] == eos
        texts.append(tokenizer.decode(ids[:-1]) if ended else tokenizer.decode(ids) + " ...")
    return texts


def worth(prompt, text):
    """A text with its true reward before it; on a prompt outside the toy world, the text alone."""
    if not world.PROMPT.fullmatch(prompt):
        return text
    mark = "" if world.parse(text) else "ill-formed:"
    return f"{world.true_reward(prompt, text):+.1f} {mark}{text}"


def answers(models, tokenizer, prompt, n=3):
    """Print n answers of every model to one prompt, on the toy world with their true rewards."""
    toy = ", with their true rewards" if world.PROMPT.fullmatch(prompt) else ""
    print(f"\n{prompt!r}{toy}")
    columns = []
    for name, model in models.items():
        texts = sample_answers(model, tokenizer, prompt, n)
        columns.append((NAMES[name], [worth(prompt, text) for text in texts]))
    print(side_by_side(columns))
