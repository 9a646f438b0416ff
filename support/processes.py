"""More than one process: torchrun --standalone --nproc_per_node=2 train.py ...

Every process holds the whole model and works through its own part of each batch. The gradients
are added up before each step, so all processes take the same step. Only the first one writes.
Without torchrun there is one process, and nothing here has an effect.

DistributedDataParallel does the same around a model's forward(). Here a model is used through
hidden() and head, and all that is left of it is this sum.
"""
import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from tqdm import tqdm


def join(device):
    """Join the processes that torchrun has started, if it has. Returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    here, number = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cuda":
        if number > torch.cuda.device_count():
            raise SystemExit(f"{number} processes need {number} GPUs, and this machine has "
                             f"{torch.cuda.device_count()}; lower --nproc_per_node")
        device = f"cuda:{here}"
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise SystemExit(f"processes cannot share --device {device}; add --device cpu")
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank():  # one voice is enough; errors are still heard
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return device


def leave():
    """Whether this process is the first, which goes on alone. For the others all is done."""
    first = rank() == 0
    if size() > 1:
        dist.barrier()
        dist.destroy_process_group()
    return first


def size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """The number of this process: 0 for the first, and where there is only one."""
    return dist.get_rank() if size() > 1 else 0


def wait():
    """Until every process has come here."""
    if size() > 1:
        dist.barrier()


def mine(items):
    """The part of a list that this process works on."""
    return items[rank()::size()]


def add_up(tensor):
    """Put the sum over the processes into a tensor, in each of them."""
    if size() > 1:
        dist.all_reduce(tensor)


def add_up_gradients(model):
    for p in model.parameters():
        if size() > 1 and p.grad is None:  # this process had no part of a small batch
            p.grad = torch.zeros_like(p)
        if p.grad is not None:
            add_up(p.grad)


def everyones(thing):
    """What each process holds, a list in their order."""
    things = [thing] * size()
    if size() > 1:
        dist.all_gather_object(things, thing)
    return things


def add_up_numbers(numbers):
    """Add up dicts of floats over the processes, name by name."""
    everyone = everyones(numbers)
    names = dict.fromkeys(name for one in everyone for name in one)
    return {name: sum(one.get(name, 0.0) for one in everyone) for name in names}


def any_of(flag):
    """Whether it is true in one of the processes at least."""
    return add_up_numbers({"flag": float(flag)})["flag"] > 0


def side_by_side(jobs, device):
    """Call all jobs, functions without arguments. On a CPU each has a thread and one core: a small
    model gains little from a second core, and torch lets other threads run while it computes. A
    GPU, and the processes of torchrun, do one job after the other."""
    if len(jobs) < 2 or device != "cpu" or size() > 1:
        for job in jobs:
            job()
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(job) for job in jobs[1:]]
            jobs[0]()  # in this thread, the one that hears Ctrl-C
            for other in others:
                other.result()  # raises what the job has raised
    finally:
        torch.set_num_threads(before)
