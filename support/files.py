"""Reading and writing files: JSON, and writing so that no file is ever half written."""
import contextlib
import hashlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def atomic(path):
    """A path beside `path` to write to. Once the block has ended without an error, the new file
    takes the place of the old one. So `path` never holds half of it, even if the power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"writing-{path.name}")  # in front: figures are told by their ending
    try:
        yield beside
        with open(beside, "rb+") as f:
            os.fsync(f.fileno())  # the disk has all of it before the old file is gone
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", newline="\n") as f:
        f.write(json.dumps(row) + "\n")


def read_jsonl(path):
    """The objects of a file that holds one a line. An absent file holds none. A last line without
    its end is left out: the program was stopped while it wrote it."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def sha256(path, without=0):
    """The SHA-256 of a file's bytes, less the last `without` of them, in hexadecimal. For a folder,
    that of all its files. Raises OSError where something cannot be read."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)} ".encode())
        return digest.hexdigest()
    left = path.stat().st_size - without
    with open(path, "rb") as f:
        while left > 0 and (block := f.read(min(left, 2 ** 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
