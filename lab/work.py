"""Named pieces of work on finished runs, each done once, in a pool of processes.

A piece of work is a function with settings. It has a folder inside the folder of the run, with
settings.json at first, then whatever the function keeps there, and result.json at last. So a piece
that has a result is done, and after an interruption only the others are left.
"""
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from lab.finished import Finished
from support.files import read_json, write_json


@dataclass(frozen=True)
class Piece:
    """function(run, folder, **settings), with a Finished run, returns what JSON can hold."""
    name: str  # its folder, inside that of the run
    function: Callable
    settings: dict = field(default_factory=dict)
    needs: tuple = ()  # the names of pieces that must be done before


def result(folder, name):
    """The result of a piece on the run in a folder. None if it is not done."""
    file = Path(folder) / name / "result.json"
    return read_json(file) if file.exists() else None


def do(pieces, folders, device="cpu"):
    """Do what is not done yet: every piece, on the run in each of the folders."""
    jobs = list(itertools.product(pieces, map(Path, folders)))
    refuse_other_settings(jobs)
    waiting = [(piece, folder) for piece, folder in jobs if result(folder, piece.name) is None]
    if not waiting:
        return
    cores, running = os.cpu_count(), {}
    with processes(cores) as pool, tqdm(total=len(waiting), desc="work", unit="piece",
                                        dynamic_ncols=True, disable=False) as bar:
        while waiting or running:
            ready = [job for job in waiting if is_ready(*job)]
            for job in ready[:cores - len(running)]:
                waiting.remove(job)
                running[pool.submit(do_one, *job, device)] = job
            if not running:
                piece, folder = waiting[0]
                raise ValueError(f"{piece.name} needs {piece.needs}, not all of them in {folder}")
            names = [Path(piece.name).name for piece, _ in [*running.values(), *waiting]]
            bar.set_postfix_str("still to do: " + ", ".join(dict.fromkeys(names)))
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for job in done:
                del running[job]
                job.result()  # raises what the process raised
                bar.update()
        bar.set_postfix_str("")


def is_ready(piece, folder):
    return all(result(folder, name) is not None for name in piece.needs)


def do_one(piece, folder, device="cpu"):
    """Do one piece, in a process of the pool."""
    torch.set_num_threads(1)  # a process a core is twice as fast as two threads for each
    run, own = finished(folder, device), folder / piece.name
    own.mkdir(parents=True, exist_ok=True)
    write_json(piece.settings, own / "settings.json")
    torch.manual_seed(run.seed)
    write_json(piece.function(run, own, **piece.settings), own / "result.json")


@lru_cache
def finished(folder, device):
    """A Finished run, loaded once in each process. It keeps what it has computed."""
    return Finished(folder, device)


def refuse_other_settings(jobs):
    """Raises SystemExit where a piece was begun with other settings than it has now."""
    others = []
    for piece, folder in jobs:
        different = differences(folder / piece.name / "settings.json", piece.settings)
        if different:
            others.append(f"{folder / piece.name} was made with {different}: "
                          "remove that folder to begin anew")
    if others:
        raise SystemExit("\n".join(others))


def differences(file, settings):
    """How the settings recorded in a file differ from these, a text. Empty if they do not."""
    before = read_json(file) if file.exists() else settings
    return "; ".join(f"{name} = {before.get(name)}, not {settings.get(name)}"
                     for name in before | settings if before.get(name) != settings.get(name))


@contextlib.contextmanager
def processes(count):
    """A pool of processes. They show no progress bars: the parent's bar stands for them.

    glibc hands every large buffer back to the system and fetches it again for the next operation.
    The MALLOC settings stop that, which saves these small models a twentieth of their time.
    """
    settings = {"TQDM_DISABLE": "1", "MALLOC_MMAP_THRESHOLD_": str(2 ** 25),
                "MALLOC_TRIM_THRESHOLD_": str(2 ** 32)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)  # read by the processes as they start
    spawn = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(count, spawn) as pool:
            yield pool
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command goes on with what is not done yet.")
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
