"""Thousands of files of preference pairs, good ones and broken ones: none may end in a traceback.

    python tests/fuzz_files.py --number 20000 --seed 0

Each file is made from rows of all forms, and most files are then damaged. Whatever the file, it is
read or refused with a DataError, within seconds, and the folder is as it was. Rows that nothing
was done to are read as they were made. What is read can be written and read again, and the tokens
of it spell the same text.
"""
import argparse
import faulthandler
import gzip
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data import DataError, Pair
from support.preferences import read_rows, save_preferences

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    parquet = None

SECONDS = 5  # more than this is a hang
CONTAINERS = [".jsonl", ".jsonl", ".jsonl.gz", ".json"] + [".parquet"] * bool(parquet)
PIECES = ["a", "Zoë", " ", "  ", "\n", "\r\n", "\t", "\0", "\u2028", "\x85", "\ufeff", "\U0001f600",
          "\u05e9\u05dc\u05d5\u05dd", "\u202e", "<|endoftext|>", '"', "\\", "{", "[]", "Human:",
          "\n\nAssistant:", "\n\nHuman: ", "e\u0301", "'s", "123", "not bad"]
VALUES = [None, True, 0, -1.5, "", " ", [], {}, "\ud800", [[]], ["x"], {"role": "user"},
          {"from": "human", "value": "x"}, [{"role": [], "content": "x"}], float("nan"), "x" * 3000]
KEYS = ["promt", "Prompt", "question", "messages", "system", "winner", "score", "", "\ud800"]
SPLINTERS = [b"\xef\xbb\xbf", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b"\r", b"\n", b"\n\n", b"{",
             b"}", b'"', b",", b"\\", b"\\ud800", b"NaN", b"1e999", b"9" * 5000, b"[" * 3000,
             b'{"a":' * 960, b" " * 2000, b'"chosen": 1,', b"\xff\xfe", b"\x1f\x8b"]


def text(rng):
    """A text that is not blank."""
    return "".join(rng.choices(PIECES, k=rng.randint(0, 6))) + rng.choice("abc?")


def make_row(rng):
    """A good row of any form, and the Pair that it is: texts, a dialogue, or messages."""
    prompt, chosen, rejected = text(rng), text(rng), text(rng)
    form = rng.randrange(6)
    if form == 0:
        return dict(prompt=prompt, chosen=chosen, rejected=rejected), Pair(prompt, chosen, rejected)
    hh = f"\n\nHuman: {prompt}\n\nAssistant:"
    if form == 1:  # the answers must not hold the border once more
        pair = Pair(hh, " yes " + chosen.replace("\n", ""), " no " + rejected.replace("\n", ""))
        return dict(chosen=hh + pair.chosen, rejected=hh + pair.rejected), pair
    pair = Pair(hh, " " + chosen, " no " + rejected)
    before = [{"role": "user", "content": prompt}]
    good, bad = [{"role": "assistant", "content": x[1:]} for x in (pair.chosen, pair.rejected)]
    if form == 2 and chosen != "no " + rejected:
        return dict(chosen=[*before, good], rejected=[*before, bad]), pair
    if form == 3:
        return dict(prompt=before, chosen=[*before, good], rejected=[*before, bad]), pair
    if form == 4:
        return dict(messages=before, chosen=good, rejected=bad), pair
    return dict(prompt=before, chosen=[good], rejected=[bad]), pair


def damage_row(rng, row):
    """A row with another value, without a key, or with another key, or something else."""
    row = dict(row)
    key = rng.choice(list(row))
    kind = rng.randrange(4)
    if kind == 0:
        row[key] = rng.choice(VALUES)
    elif kind == 1:
        row.pop(key)
    elif kind == 2:
        row[rng.choice(KEYS)] = row.pop(key) if rng.random() < 0.5 else rng.choice(VALUES)
    return row if kind < 3 else rng.choice(VALUES)


def damage_bytes(rng, content):
    """A file with bytes cut out, put in or exchanged, at up to three places."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(content))
        stop = min(len(content), start + rng.choice([0, 0, 1, 1, 5, 100, 10 ** 9]))
        content[start:stop] = rng.choice([b"", bytes([rng.randrange(256)]), rng.choice(SPLINTERS)])
    return bytes(content)


def as_bytes(rng, rows, ending):
    """Rows in a file of this ending. None where Parquet cannot hold them."""
    if ending == ".parquet":
        file = io.BytesIO()
        try:
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        except (pyarrow.ArrowException, AttributeError, UnicodeError, TypeError):
            return None
        return file.getvalue()
    ascii = rng.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    if ending == ".json":
        return f"[{', '.join(lines)}]".encode("utf-8", "surrogatepass")
    content = rng.choice(["\n", "\r\n", "\n\n"]).join(lines).encode("utf-8", "surrogatepass")
    content = rng.choice([b"", b"\xef\xbb\xbf"]) + content + rng.choice([b"", b"\n", b" \n"])
    return gzip.compress(content) if ending.endswith(".gz") else content


def check(rng, folder, tokenizers):
    """Make a file, read it, and assert what the heading says. Returns what became of it."""
    made = [make_row(rng) for _ in range(rng.randint(0, 12) // 2)]
    rows, wanted = [row for row, _ in made], [pair for _, pair in made]
    ending = rng.choice(CONTAINERS)
    whole = True
    if ending == ".parquet":  # all rows have the same columns
        rows = [row for row in rows if row.keys() == rows[0].keys()]
        wanted = [pair for row, pair in made if row in rows]
    while rows and rng.random() < 0.4:
        i, whole = rng.randrange(len(rows)), False
        rows[i] = damage_row(rng, rows[i]) if isinstance(rows[i], dict) and rows[i] else None
    content = as_bytes(rng, rows, ending)
    if content is None:
        return ["(not to be held in Parquet)"]
    if rng.random() < 0.4:
        content, whole = damage_bytes(rng, content), False
    path = folder / f"pairs{ending}"
    path.write_bytes(content)

    start, bad = time.perf_counter(), {}
    try:
        pairs = [Pair(*texts) for _, *texts in read_rows(path, skip_bad_rows=True, bad=bad)]
    except DataError as error:
        assert not (whole and rows), f"a good file is refused: {error}"
        pairs = None
        outcome = list(bad) or [str(error).removeprefix(f"{path}: ").split(" (")[0]]
    else:
        outcome = ["accepted", *bad]
    try:
        all_pairs = data.load_preferences(path)
        assert pairs == all_pairs and not bad, "without bad rows, nothing is skipped"
    except DataError as error:
        assert str(path) in str(error) and len(str(error)) < 3000
        assert pairs is None or bad, f"refused without a reason: {error}"
    assert time.perf_counter() - start < SECONDS
    assert [*folder.iterdir()] == [path] and path.read_bytes() == content, "the folder has changed"
    path.unlink()
    if whole and rows:
        assert pairs == wanted
    if pairs:
        save_preferences(pairs, folder / "again.jsonl")
        assert data.load_preferences(folder / "again.jsonl") == pairs
        (folder / "again.jsonl").unlink()
        for tokenizer in tokenizers:
            for p, e in zip(pairs, data.tokenize(pairs, tokenizer)[0], strict=True):
                for ids, spelt in ((e.prompt, p.prompt), (e.chosen[:-1], p.chosen),
                                   (e.rejected[:-1], p.rejected)):
                    assert tokenizer.decode(ids) == spelt and tokenizer.eot_token not in ids
    return outcome


def fuzz(number, seed, tokenizers):
    """How many of the files had each outcome, a Counter. Prints the number of one that fails."""
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(number):
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
            try:
                counts.update(check(random.Random(f"{seed} {i}"), Path(folder), tokenizers))
            except BaseException:
                print(f"file {i} of seed {seed}; what was read is in {folder}", file=sys.stderr)
                raise
            finally:
                faulthandler.cancel_dump_traceback_later()
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", nargs="+", default=["toy"], choices=["toy", "gpt2"])
    args = parser.parse_args()
    start = time.time()
    counts = fuzz(args.number, args.seed, [data.get_tokenizer(name) for name in args.tokenizer])
    for outcome, n in counts.most_common():
        print(f"{n:>8,}  {outcome}")
    print(f"{args.number:,} files, none of which failed, in {time.time() - start:.0f} s. "
          "A file with several kinds of bad rows counts for each.")
