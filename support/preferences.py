"""Users' files of preference pairs: read and checked row by row, and split by prompt."""
import gzip
import json
import zlib
from pathlib import Path

import torch

ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}  # Anthropic HH's headings
ANSWER = "\n\nAssistant:"


class DataError(ValueError):
    """A file that cannot be used as it is. The message names the file, the line, the value, and
    what to do."""


def read_rows(path):
    """Every pair of a file, a list of (prompt, chosen, rejected, where). Nothing is skipped or cut.

    path: one JSON object a line (.jsonl, .jsonl.gz), or a JSON array (.json), in UTF-8. Forms:
      {"prompt": "...", "chosen": "...", "rejected": "..."}
      {"chosen": "...", "rejected": "..."}: both hold the whole dialogue. The prompt is what they
          have in common, up to the last "\\n\\nAssistant:", as in Anthropic's HH data, or else
          up to the last whole word.
      messages: the same two forms, where each text is a list of
          {"role": "system" | "user" | "assistant", "content": "..."}.
    Raises DataError, naming file, line and value, for anything else.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz")
    text = read_text(path)
    rows = []
    if name.endswith(".jsonl"):
        # split on \n alone: strings in JSON may hold other line separators
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {i}"
                rows.append((where, parse_json(line, where)))
    elif name.endswith(".json"):
        array = parse_json(text, str(path))
        if not isinstance(array, list):
            raise DataError(f"{path}: a .json file must hold an array of objects, this one holds "
                            f"{show(array)}; for one object a line, name it .jsonl")
        rows = [(f"{path}, item {i}", row) for i, row in enumerate(array, 1)]
    else:
        raise DataError(f"{path}: the name must end in .jsonl, .jsonl.gz or .json, "
                        "so that the format is known")
    if not rows:
        raise DataError(f"{path}: holds no pairs")
    return [read_pair(row, where) for where, row in rows]


def read_text(path):
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as f:
            return f.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.object[error.start]:#04x} at position {error.start} "
                        "is not UTF-8; save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def parse_json(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON, {error.msg} at character {error.pos + 1} of "
                        f"{show(text)}") from error


def show(value):
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def read_pair(row, where):
    """A row of a file -> (prompt, chosen, rejected, where), three texts that can be used."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: {show(row)} is not an object with prompt, chosen and rejected")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(f"{where}: no {key!r}; the keys are {sorted(row)}. "
                            "Wanted: prompt, chosen, rejected")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = from_messages(prompt, chosen, rejected, where)
    for key, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        left_out = key == "prompt" and "prompt" not in row
        if not isinstance(value, str) and not left_out:
            raise DataError(f"{where}: {key} is {show(value)}; wanted a text, "
                            "or lists of messages for both answers")
    if prompt is None:
        prompt, chosen, rejected = split_dialogue(chosen, rejected, where)
    for key, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not value.strip():
            raise DataError(f"{where}: {key} is empty ({value!r}); remove the row or fill it in")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise DataError(f"{where}: {key} holds half of a surrogate pair, which is no "
                            f"character: {show(value)}")
    return prompt, chosen, rejected, where


def common_length(a, b):
    """How many items two texts or lists have in common from the start."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def split_dialogue(chosen, rejected, where):
    """The whole dialogue twice -> prompt, chosen, rejected."""
    n = common_length(chosen, rejected)
    common = chosen[:n]
    if ANSWER in common:
        n = common.rindex(ANSWER) + len(ANSWER)
    else:
        while n and not chosen[n - 1:n].isspace():  # "the cat", "the car" share "the", not "the ca"
            n -= 1
        n = len(common[:n].rstrip())  # the space belongs to the response
    if not n:
        raise DataError(f"{where}: no prompt, and chosen and rejected do not begin alike "
                        f"({show(chosen)}, {show(rejected)}). "
                        "Give a prompt, or the whole dialogue in both")
    return chosen[:n], chosen[n:], rejected[n:]


def from_messages(prompt, chosen, rejected, where):
    """Lists of messages -> three texts.

    A prompt that is given as text beside whole dialogues must be the last user message.
    """
    for messages in (chosen, rejected, prompt if isinstance(prompt, list) else []):
        for m in messages:
            known = isinstance(m, dict) and m.get("role") in ROLES
            if not (known and isinstance(m.get("content"), str)):
                raise DataError(f"{where}: message {show(m)}; wanted {{'role': one of "
                                f"{list(ROLES)}, 'content': text}}")
    if not isinstance(prompt, list):
        n = common_length(chosen, rejected)
        if n == min(len(chosen), len(rejected)):
            n -= 1  # the last message is the answer, also where both are the same
        if isinstance(prompt, str) and (n < 1 or chosen[n - 1]["content"] != prompt):
            raise DataError(f"{where}: prompt {show(prompt)} is not the message before the two "
                            "answers; leave prompt out, or give it as a list of messages")
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise DataError(f"{where}: {key} must end in exactly one assistant message after "
                            f"the common prompt, got {show(answer)}")
    if not prompt:
        raise DataError(f"{where}: no prompt message before the answers")
    text = "".join(f"\n\n{ROLES[m['role']]}: {m['content']}" for m in prompt) + ANSWER
    return text, " " + chosen[0]["content"], " " + rejected[0]["content"]


def save_preferences(pairs, path):
    """Write pairs as JSONL, the format that users bring. Refuses to overwrite a file."""
    with open(path, "x", encoding="utf-8", newline="\n") as f:
        for p in pairs:
            row = {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def leave_out_equal(pairs):
    """(usable, left out). A pair whose chosen is its rejected teaches nothing: its loss is ln 2
    and its gradient is 0, whatever the policy does."""
    usable = [p for p in pairs if p.chosen != p.rejected]
    return usable, [p for p in pairs if p.chosen == p.rejected]


def split_by_prompt(pairs, seed):
    """(train, held out): a tenth of the prompts is held out. All pairs of a prompt are on one side.
    Else the held-out figures would measure memory."""
    names = sorted({p.prompt for p in pairs})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    n = round(len(names) / 10)
    if n == 0:
        raise DataError(f"{len(names)} different prompts cannot be split into train and "
                        "10% held out; bring more prompts")
    held_out = {names[i] for i in order[:n]}
    train = [p for p in pairs if p.prompt not in held_out]
    return train, [p for p in pairs if p.prompt in held_out]


def split(pairs, seed):
    """A user's pairs -> (train, held out, left out because chosen is rejected)."""
    usable, equal = leave_out_equal(pairs)
    train, held_out = split_by_prompt(usable, seed)
    return train, held_out, equal
