"""Checkpoints: a model's config, weights and facts about it, in one file with a checksum."""
import hashlib
import os
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from model import GPT, GPTConfig
from support import processes
from support.files import atomic, sha256
from support.preferences import DataError

# torch.save writes a zip archive. A zip archive may end in a comment: here "sha256 " and the
# SHA-256 of all that stands before it.
SEAL = b"sha256 "
SEAL_LENGTH = len(SEAL) + 64


def save(obj, path):
    """torch.save, atomically (see `support.files.atomic`), and sealed with a checksum."""
    if processes.rank() > 0:
        return
    with atomic(path) as beside:
        try:
            torch.save(obj, beside)
        except RuntimeError as error:  # torch does not say that a disk is full
            raise OSError(f"{path} could not be written. Is the disk full? ({error})") from error
        with open(beside, "r+b") as f:
            f.seek(-2, os.SEEK_END)  # the length of the comment
            f.write(struct.pack("<H", SEAL_LENGTH))
        seal = SEAL + sha256(beside).encode()
        with open(beside, "ab") as f:
            f.write(seal)


def load(path, device="cpu"):
    """What `save` wrote. With weights_only, a checkpoint cannot run code. Raises DataError where
    the file is not one, or is not whole, or was changed by as little as a bit."""
    path = Path(path)
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - SEAL_LENGTH))
        seal = f.read()
    if not seal.startswith(SEAL):
        what = "it was cut short, or it is another kind of file"
        if zipfile.is_zipfile(path):
            what = "an older version of this project or another program wrote it"
        raise DataError(f"{path} is not a checkpoint that can be read: {what}. Train it again.")
    if seal != SEAL + sha256(path, without=SEAL_LENGTH).encode():
        raise DataError(f"{path} is not a checkpoint that can be read: its content has changed "
                        "since it was written. Use a copy, or delete it and train it again.")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise DataError(f"{path} is not a checkpoint that can be read: {error}") from error


def save_model(model, path, **facts):
    """Write a checkpoint: the model's config and weights, and facts about it (plain values)."""
    # the tied head is listed once, as wte.weight
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    facts["torch"] = str(torch.__version__)
    save({"config": asdict(model.config), "weights": weights, "facts": facts}, path)


def load_model(path, device="cpu"):
    """A checkpoint of `save_model` -> (model, facts). Raises DataError where it is not one."""
    saved = load(path)
    try:
        weights = saved["weights"]
        model = GPT(GPTConfig(**saved["config"]))
        model.load_state_dict(weights | {"head.weight": weights["wte.weight"]})
        return model.to(device), saved["facts"]
    except Exception as error:
        raise DataError(f"{path} holds no model of this project: {error}") from error


def fingerprint(model):
    """A text that differs between models whose weights differ: a hash of every name, shape and
    byte."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        weights = p.detach().cpu().numpy()
        digest.update(f"{name} {weights.dtype} {weights.shape} ".encode() + weights.tobytes())
    return digest.hexdigest()
