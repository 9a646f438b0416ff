"""Users' files of preference pairs: read and checked row by row, and split by prompt."""
import codecs
import difflib
import gzip
import hashlib
import json
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}  # Anthropic HH's headings
ANSWER = "\n\nAssistant:"
LONGEST = 500_000  # characters of a text; at a million spaces in a row, tiktoken would panic
TOO_DEEP = "nested too deeply", "more brackets in brackets than Python reads"
OTHER_NAMES = {  # what other data sets call the three columns
    "prompt": {"question", "instruction", "query", "input", "conversation", "conversations"},
    "chosen": {"preferred", "accepted", "winner", "good", "better", "positive",
               "chosen_response", "response_chosen"},
    "rejected": {"dispreferred", "loser", "bad", "worse", "negative",
                 "rejected_response", "response_rejected"},
}
LOST = ["system", "system_prompt", "input", "history"]  # others put them in front of the prompt


class DataError(ValueError):
    """A file that cannot be used as it is. The message names the file, the line, the value, and
    what to do."""


class BadRow(Exception):
    """A row that cannot be used: (the reason, one of a few fixed texts; what stands there)."""


# ---- A whole file

def read_rows(path, skip_bad_rows=False, bad=None):
    """Yield (number, prompt, chosen, rejected) for each row that can be used. Nothing is cut.

    path: one JSON object a line (.jsonl, .jsonl.gz), or a JSON array (.json), in UTF-8. With the
    library datasets also a .parquet file, or a folder that its save_to_disk has written. Forms:
      {"prompt": "...", "chosen": "...", "rejected": "..."}
      {"chosen": "...", "rejected": "..."}: both hold the whole dialogue. The prompt is what they
          have in common, up to the last "\\n\\nAssistant:", as in Anthropic's HH data, or else
          up to the last whole word.
      messages: the same two forms, where each text is a list of
          {"role": "system" | "user" | "assistant", "content": "..."}. The prompt may also be
          called "messages", and both answers may begin with it.
    number: of the line, item or row, counted from 1. The file is read as a stream.
    bad: a dict that rows that cannot be used are noted in, {reason: (what the first of them
    holds, their numbers)}.
    Raises DataError: at once, where the file cannot be read; after the last row, where rows cannot
    be used and are not to be skipped, or none is left.
    """
    path, bad = Path(path), {} if bad is None else bad
    good = seen = 0
    for number, row in open_rows(path):
        seen += 1
        try:
            texts = read_pair(row)
        except (BadRow, RecursionError) as error:
            reason, found = error.args if isinstance(error, BadRow) else TOO_DEEP
            bad.setdefault(reason, (found, []))[1].append(number)
        else:
            good += 1
            yield number, *texts
        stopped = seen == 100 and not good and not skip_bad_rows
        if stopped:
            break  # a million more would say the same
    if not seen:
        raise DataError(f"{path}: holds no pairs")
    n = seen - good
    if not n or good and skip_bad_rows:
        return
    repair = f"Repair {'it' if n == 1 else 'them'}"
    if good or stopped:
        repair += ", or add --skip-bad-rows, which leaves out and counts what cannot be used"
    if n == 1:
        (reason, (found, numbers)), = bad.items()
        raise DataError(f"{path}, {places(path, numbers)}: {reason} ({found}). {repair}.")
    which = f"the first {n}" if stopped else f"{n:,} of {seen:,}"
    raise DataError(f"{path}: {which} rows cannot be used.\n{list_reasons(path, bad)}\n{repair}.")


def places(path, numbers):
    """Where some rows of a file stand: "line 3", or "lines 3, 5, 8, 9, 12, ..."."""
    endings = {".jsonl": "line", ".json": "item"}
    unit = endings.get(Path(Path(path).name.removesuffix(".gz")).suffix, "row")
    first = ", ".join(map(str, numbers[:5]))
    return f"{unit}{'s' * (len(numbers) > 1)} {first}{', ...' * (len(numbers) > 5)}"


def list_reasons(path, bad):
    """What `read_rows` has noted as bad, one reason a line."""
    return "\n".join(f"  {len(numbers):,}: {reason} ({found}), {places(path, numbers)}"
                     for reason, (found, numbers) in bad.items())


def open_rows(path):
    """Yield (number, row) of a file. row: a line in bytes, or an object."""
    name = path.name.removesuffix(".gz")
    if path.is_dir() or name.endswith(".parquet"):
        yield from enumerate(read_table(path), 1)
    elif name.endswith(".jsonl"):
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                yield number, line
    elif name.endswith(".json"):
        try:
            array = parse_json(b"".join(read_lines(path)))
        except (BadRow, RecursionError) as error:
            reason, found = error.args if isinstance(error, BadRow) else TOO_DEEP
            raise DataError(f"{path}: {reason} ({found}); for one object a line, name it "
                            ".jsonl") from error
        if not isinstance(array, list):
            raise DataError(f"{path}: a .json file must hold an array of objects; for one object "
                            "a line, name it .jsonl")
        yield from enumerate(array, 1)
    else:
        raise DataError(f"{path}: the name must end in .jsonl, .jsonl.gz, .json or .parquet, "
                        "so that the format is known")


def read_lines(path):
    """Yield the lines of a file, in bytes. Only \\n ends a line: strings in JSON may hold other
    line separators."""
    try:
        with open(path, "rb") as file, progress(path.stat().st_size, "B") as bar:
            lines = gzip.open(file) if path.suffix == ".gz" else file
            for i, line in enumerate(lines):
                bar.update(file.tell() - bar.n)
                yield line if i else line.removeprefix(codecs.BOM_UTF8)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_table(path):
    """Yield the rows of a Parquet file, or of a folder written by datasets' save_to_disk."""
    try:
        if path.is_dir():
            from datasets import load_from_disk  # only here: few need it, and it takes seconds
            table = load_from_disk(str(path))
            if isinstance(table, dict):
                splits = " or ".join(str(path / split) for split in table)
                raise DataError(f"{path}: holds several splits; give one of them: {splits}")
            total, batches = len(table), table.with_format("arrow").iter(100)
        else:
            from pyarrow.parquet import ParquetFile  # it comes with datasets
            file = ParquetFile(path)
            total, batches = file.metadata.num_rows, file.iter_batches(100)
        with progress(total, "row") as bar:
            for batch in batches:
                yield from batch.to_pylist()
                bar.update(len(batch))
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{path}: a folder or a Parquet file is read by the library datasets; "
                        "install it with: pip install datasets") from error
    except Exception as error:  # the library raises whatever it likes
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def progress(total, unit):
    return tqdm(desc="    read", total=total, unit=unit, unit_scale=True, delay=2,
                dynamic_ncols=True)


# ---- One row

def parse_json(raw):
    """JSON in bytes -> an object. Raises BadRow, or RecursionError."""
    try:
        text = raw.decode("utf-8").rstrip()
        return json.loads(text, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {raw[error.start]:#04x} at position {error.start + 1}; "
                     "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadRow("not JSON", f"{error.msg} at character {error.pos + 1} of "
                     f"{show(text)}") from error
    except ValueError as error:  # Python's own limit
        raise BadRow("a number with thousands of digits", show(text)) from error


def unique(items):
    """A JSON object. With a key that stands twice it is a BadRow: one value would be lost."""
    row = dict(items)
    if len(row) == len(items):
        return row
    (key, _), = Counter(key for key, _ in items).most_common(1)
    return BadRow("a key stands twice", show(key))


def show(value):
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def read_pair(row):
    """A row of a file -> (prompt, chosen, rejected), three texts that can be used, or BadRow."""
    if isinstance(row, bytes):
        row = parse_json(row)
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("not an object with prompt, chosen and rejected", show(row))
    if "messages" in row and "prompt" not in row:
        row = row | {"prompt": row["messages"]}
    for wanted in [name for name in OTHER_NAMES if name not in row]:
        meant = [key for key in row if key not in OTHER_NAMES and is_like(key, wanted)]
        if meant or wanted != "prompt":
            hint = "".join(f"; rename {key!r} to {wanted!r}, or remove it" for key in meant[:1])
            raise BadRow(f"no {wanted!r}", f"the keys are {show(list(row))}{hint}")
    for key in LOST:
        if row.get(key):
            raise BadRow(f"{key!r} would be lost", f"{show(row[key])}; put it in front of the "
                         "prompt, or remove it")
    texts = [row.get(name) for name in OTHER_NAMES]
    texts = [[x] if isinstance(x, dict) else x for x in texts]
    if all(isinstance(x, list) for x in texts[1:]) and isinstance(texts[0], str | list | None):
        texts = from_messages(*texts)
    elif "prompt" not in row and all(isinstance(x, str) for x in texts[1:]):
        texts = split_dialogue(*texts[1:])
    for key, text in zip(OTHER_NAMES, texts):
        if not isinstance(text, str):
            raise BadRow(f"{key} is neither a text, nor are all three lists of messages",
                         show(text))
        if not text.strip():
            raise BadRow(f"{key} is empty", show(text))
        if len(text) > LONGEST:
            raise BadRow(f"{key} has more than {LONGEST:,} characters", show(text))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"{key} holds half of a surrogate pair, which is no character",
                         show(text[error.start:])) from error
    return texts


@lru_cache(maxsize=1000)
def is_like(key, wanted):
    """Whether a key is likely meant to be the wanted one."""
    key = key.strip().lower()
    return key in OTHER_NAMES[wanted] or bool(difflib.get_close_matches(key, [wanted], cutoff=.82))


def common_length(a, b):
    """How many items two texts or lists have in common from the start."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def split_dialogue(chosen, rejected):
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
        raise BadRow("no prompt, and chosen and rejected do not begin alike",
                     f"{show(chosen)}, {show(rejected)}")
    return chosen[:n], chosen[n:], rejected[n:]


def from_messages(prompt, chosen, rejected):
    """Lists of messages -> three texts.

    A prompt that is given as text beside whole dialogues must be the last user message.
    """
    for messages in (chosen, rejected, prompt if isinstance(prompt, list) else []):
        for m in messages:
            known = isinstance(m, dict) and m.get("role") in list(ROLES)
            if not (known and isinstance(m.get("content"), str)):
                raise BadRow(f"a message is not {{'role': one of {list(ROLES)}, 'content': text}}",
                             show(m))
    if isinstance(prompt, list):
        n = len(prompt)
        if chosen[:n] == rejected[:n] == prompt:
            chosen, rejected = chosen[n:], rejected[n:]
    else:
        n = common_length(chosen, rejected)
        if n == min(len(chosen), len(rejected)):
            n -= 1  # the last message is the answer, also where both are the same
        if isinstance(prompt, str) and (n < 1 or chosen[n - 1]["content"] != prompt):
            raise BadRow("the prompt is not the message before the two answers; leave it out, or "
                         "give it as a list of messages", show(prompt))
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise BadRow(f"{key} must end in exactly one assistant message after the common "
                         "prompt", show(answer))
    if not prompt:
        raise BadRow("no prompt message before the answers", show(chosen))
    text = "".join(f"\n\n{ROLES[m['role']]}: {m['content']}" for m in prompt) + ANSWER
    return text, " " + chosen[0]["content"], " " + rejected[0]["content"]


# ---- Pairs

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


def digest(text):
    """A text in 8 bytes, an integer. Two texts of a million share theirs once in 10^7 files."""
    hashed = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(hashed, "big", signed=True)


def hold_out(prompts, seed, path):
    """Which pairs are held out, (N,) bool: those of a tenth of the prompts. All pairs of a prompt
    are on one side. Else the held-out figures would measure memory. prompts (N,): their digests."""
    names = np.unique(prompts)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).numpy()
    n = round(len(names) / 10)
    if n == 0:
        raise DataError(f"{path}: {len(names)} different prompts cannot be split into train and "
                        "10% held out; bring more prompts")
    return np.isin(prompts, names[order[:n]])
