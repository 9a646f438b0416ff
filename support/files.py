"""Reading and writing files: JSON, and writing so that no file is ever half written."""
import contextlib
import hashlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def atomic(path):
    """A path beside `path` to write to. Once the block has ended without an error, the new file
    takes the place of the old one. So `path` never holds half of it."""
    path = Path(path)
    beside = path.with_name(f"writing-{path.name}")  # in front: figures are told by their ending
    yield beside
    os.replace(beside, path)


def write_json(value, path):
    with atomic(path) as beside:
        beside.write_text(json.dumps(value, indent=1), encoding="utf-8", newline="\n")


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_jsonl(rows, path):
    """One JSON object a line."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with atomic(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def append_jsonl(row, path):
    with open(path, "a", encoding="utf-8", newline="\n") as f:
        f.write(json.dumps(row) + "\n")


def read_jsonl(path):
    """The objects of a file that holds one a line. An absent file holds none."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sha256(path):
    """The SHA-256 of a file's bytes, in hexadecimal. Raises OSError where it cannot be read."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
