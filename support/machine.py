"""What a machine has, and about what a training asks of it: device, memory and disk."""
import ctypes
import math
import os
import shutil
import sys
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from support.gpt2 import GPT2
from support.tokenizers import get_tokenizer

# Bytes a parameter. In memory: the weights, the reference's, gradients, two moments of Adam. On
# disk: three checkpoints, and state.pt with weights and moments, a new one beside the old one.
IN_MEMORY, ON_DISK = 4 + 4 + 4 + 8, 3 * 4 + 2 * 12


def devices():
    """The devices of this machine, the fastest first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name in there if there[name]] + ["cpu"]


def device(name):
    """An argparse type: "auto", or a device that this machine has."""
    if name not in ("auto", *devices()):
        raise ArgumentTypeError(f"{name} is not on this machine, which has {', '.join(devices())}")
    return name


def pick_device(name):
    """"auto" is cuda where there is one, else mps, else the CPU."""
    return devices()[0] if name == "auto" else name


def has_bfloat16(device):
    """Whether a device computes in bfloat16. An older GPU only imitates it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu"


def precision_of(dtype, device):
    """A context in which a model computes in this dtype. Its weights stay float32. Autocast would
    keep a copy of them in bfloat16 until the context ends, and a whole training takes place in it:
    every step would see the weights of the first one. So nothing is kept."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype == "bfloat16",
                          cache_enabled=False)


def recompute(model, wanted):
    """Let each block of a GPT compute its states again for the gradient, if that is wanted. A
    deepcopy of the model does it too."""
    for block in model.h if wanted else ():
        forward = type(block).forward.__get__(block)
        block.forward = partial(checkpoint, forward, use_reentrant=False)


def memory(device):
    """The bytes of memory that a device has. None where that is unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if os.name == "nt":
        status = (ctypes.c_ulonglong * 8)(64)  # MEMORYSTATUSEX; its own size comes first
        return status[1] if ctypes.windll.kernel32.GlobalMemoryStatusEx(status) else None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parameters(n_layer, n_embd, vocab_size, block_size):
    """How many numbers a model.GPT of this config holds."""
    return n_layer * (12 * n_embd ** 2 + 13 * n_embd) + (vocab_size + block_size + 2) * n_embd


def needs(args):
    """(memory, disk): the bytes that a run needs, about, if its pairs are as long as may be."""
    longest = 64 if args.data is None else args.max_length
    gpt2 = args.tokenizer == "gpt2"  # its vocabulary may have to be downloaded first
    vocabulary = 50_257 if gpt2 else get_tokenizer(args.tokenizer).n_vocab
    n_layer, n_embd = GPT2.get(args.init, (args.n_layer, args.n_embd))
    size = parameters(n_layer, n_embd, vocabulary, min(longest, 1024))
    if args.init and args.init not in GPT2:  # of these weights only the size is known
        path = Path(args.init)
        files = path.glob("*.safetensors") if path.is_dir() else [path]
        size, n_layer = sum(f.stat().st_size for f in files) / 4, 0
    # as measured: for its gradient a block keeps 24 states a token, and a logit 3 float32
    states = 24 * n_embd * (2 if args.dtype == "bfloat16" else 4)
    # where blocks compute theirs again, one of them does at a time; between blocks is float32
    states = states + 4 * n_embd * n_layer if args.recompute else states * n_layer
    tokens = 2 * math.ceil(args.batch_size / args.accumulate) * longest
    ram = IN_MEMORY * size + tokens * (states + 12 * vocabulary)
    return ram, ON_DISK * size + 20e6  # the last are metrics and figures


def check(args, device):
    """Raises ValueError where the disk cannot hold the run. Warns where the memory may not."""
    (ram, disk), has = needs(args), memory(device)
    there = next(p for p in (args.out_dir, *args.out_dir.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < disk and not args.resume:  # else much of it is written already
        raise ValueError(f"--out-dir {args.out_dir}: a run of this model writes {disk / 1e6:,.0f} "
                         f"MB and {free / 1e6:,.0f} MB are free; make room or choose another disk")
    if has is not None and has < ram:
        print(f"warning: this run may need {ram / 1e9:.1f} GB of memory; {device} has "
              f"{has / 1e9:.1f} GB. Less is needed with a larger --accumulate, or a smaller "
              "--batch-size, --max-length or model.", file=sys.stderr)
