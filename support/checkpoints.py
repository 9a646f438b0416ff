"""Checkpoints: a model's config, weights and facts about it, in one file."""
import hashlib
from dataclasses import asdict

import torch

from model import GPT, GPTConfig
from support.files import atomic


def save(obj, path):
    """torch.save, atomically: see `support.files.atomic`."""
    with atomic(path) as beside:
        torch.save(obj, beside)


def load(path, device="cpu"):
    """What `save` wrote. With weights_only, a checkpoint cannot run code."""
    return torch.load(path, map_location=device, weights_only=True)


def save_model(model, path, **facts):
    """Write a checkpoint: the model's config and weights, and facts about it (plain values)."""
    # the tied head is listed once, as wte.weight
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    save({"config": asdict(model.config), "weights": weights, "facts": facts}, path)


def load_model(path, device="cpu"):
    """A checkpoint of `save_model` -> (model, facts). Raises ValueError where it is not one."""
    try:
        saved = load(path)
        weights = saved["weights"]
        model = GPT(GPTConfig(**saved["config"]))
        model.load_state_dict(weights | {"head.weight": weights["wte.weight"]})
        return model.to(device), saved["facts"]
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint that this project can read: "
                         f"{error}") from error


def fingerprint(model):
    """A text that differs between models whose weights differ: a hash of every name, shape and
    byte."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        weights = p.detach().cpu().numpy()
        digest.update(f"{name} {weights.dtype} {weights.shape} ".encode() + weights.tobytes())
    return digest.hexdigest()


def is_fingerprint(text, model):
    """Whether a text is this model's fingerprint. Older runs hold the sum of each tensor."""
    sums = [p.detach().cpu().double().sum().item() for p in model.parameters()]
    return text in {fingerprint(model), " ".join(f"{s:.9g}" for s in sums)}
