"""What keeps somebody's functions from harming the machine, the verdict or another student.

These protections are made for accidents and simple tricks. They are no sandbox: Python has none. If
you do not trust the authors, run the whole grader in a container.
"""
import _thread
import contextlib
import faulthandler
import inspect
import io
import operator
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


class Failure(AssertionError):
    """What is wrong with the behaviour of a function, whatever the proof."""


# ---- Time and memory

class TimeLimit:
    """Inside this context, the main thread is interrupted after some seconds.

    A loop in C, or one that catches every exception, does not notice. In a process of its own
    (dump: a file for the traceback) such a loop ends the process three seconds later.
    """

    def __init__(self, seconds, dump=None):
        self.seconds, self.dump, self.fired = seconds, dump, False
        self.over = threading.Event()

    def watch(self):
        pause = self.seconds
        while not self.over.wait(pause):
            self.fired, pause = True, 1  # once more: Python drops an interrupt in a destructor
            _thread.interrupt_main()

    def __enter__(self):
        threading.Thread(target=self.watch, daemon=True).start()
        if self.dump:
            faulthandler.dump_traceback_later(self.seconds + 3, exit=True, file=self.dump)
        return self

    def __exit__(self, *error):
        self.over.set()
        if self.dump:
            faulthandler.cancel_dump_traceback_later()


def limit_memory(gigabytes):
    """No more memory than this for this process, where the system can say so: on Linux."""
    if sys.platform == "linux":
        import resource
        size = int(gigabytes * 2 ** 30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


# ---- What the verdict rests on

# Somebody's file must not change these modules, nor the project's modules, nor the classes below.
JUDGES = """torch torch.nn.functional torch.autograd torch.autograd.functional torch.linalg torch.nn
    math builtins operator itertools functools inspect pytest _pytest.python_api _pytest.raises
    hypothesis world lab.tabular exercises.compare exercises.guard tools conftest""".split()
CLASSES = [torch.Tensor, torch._C.TensorBase, pytest.Item, pytest.Function]


class Untouched:
    """A picture of what the verdict rests on: names in modules and classes, the code of functions.

    modules: more modules. held_in: the dicts that hold the functions which are exchanged.
    """

    def __init__(self, modules, held_in):
        # PyTorch imports this when it likes, and then it exchanges torch.manual_seed.
        import torch._dynamo  # noqa: F401
        modules = [sys.modules[name] for name in JUDGES if name in sys.modules] + list(modules)
        ours = [m for m in modules if str(getattr(m, "__file__", "")).startswith(str(ROOT))]
        found = [value for module in ours for value in vars(module).values()]
        self.functions = list(filter(inspect.isfunction, found))
        self.codes = [function.__code__ for function in self.functions]
        classes = [c for c in found if inspect.isclass(c) and c.__module__ != "builtins"]
        self.holders = [*held_in, *CLASSES, *classes, *modules]
        self.before = [dict(names_of(holder)) for holder in self.holders]
        self.size = len(held_in)
        self.expect({})

    def expect(self, new):
        """new: {id of a function: the one that stands in its place, where functions are held}"""
        self.values = [list(before.values()) for before in self.before]
        for values in self.values[:self.size]:
            values[:] = [new.get(id(value), value) for value in values]

    # The names below are bound now: a file may exchange those of builtins.
    def changes(self, all=all, map=map, zip=zip, same=operator.is_):
        """The names of what was changed since; all of it is put back."""
        found = []
        for holder, before, values in zip(self.holders, self.before, self.values):
            now = names_of(holder)
            if not all(map(same, values, now.values())) or len(now) < len(values):
                for key, value in zip(before, values):
                    if key not in now or not same(now[key], value):
                        found.append(f"{getattr(holder, '__name__', 'LOSSES')}.{key}")
                        put_back(holder, key, value)
        for function, code in zip(self.functions, self.codes):
            if not same(function.__code__, code):
                found.append(function.__name__)
                function.__code__ = code
        return found


def names_of(holder, isinstance=isinstance, dict=dict, vars=vars):
    return holder if isinstance(holder, dict) else vars(holder)


def put_back(holder, key, value):
    if isinstance(holder, dict):
        holder[key] = value
    else:
        setattr(holder, key, value)


@contextlib.contextmanager
def state_kept(refused=False):
    """Settings of the whole process that a function may change: they are put back.

    refused: a change is a Failure.
    """
    before = state()
    try:
        yield
    finally:
        after = state()
        torch.set_grad_enabled(before["whether gradients are recorded"])
        torch.set_default_dtype(before["the default dtype"])
        for kind in ("function", "dispatch"):  # modes that a function has entered and not left
            for _ in range(after[f"the {kind} modes"] - before[f"the {kind} modes"]):
                getattr(torch._C, f"_pop_torch_{kind}_stack")()
        changed = [name for name in before if after[name] != before[name]]
        if refused and changed:
            raise Failure(f"it changes {changed[0]} for the whole program")


def state():
    return {"whether gradients are recorded": torch.is_grad_enabled(),
            "the default dtype": torch.get_default_dtype(),
            "the function modes": torch._C._len_torch_function_stack(),
            "the dispatch modes": torch._C._len_torch_dispatch_stack()}


# ---- The machine

# Events of Python's audit, https://docs.python.org/3/library/audit_events.html. A student's file
# must not cause them: they write, start something, talk to somebody, or look into the judge.
FORBIDDEN = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "gc.", "signal.", "pty.",
             "_thread.start_new_thread", "sys.settrace", "sys.setprofile", "sys._current_frames",
             "http.", "urllib.", "ftplib.", "smtplib.", "webbrowser.", "winreg.", "_winapi.")
HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr",
            "os.putenv", "os.unsetenv", "os.chdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def forbid(path):
    """From now on, code that is called from this file can write below the working folder only.

    It cannot be undone. So it is for a process of its own.
    """
    allowed = os.path.realpath(".") + os.sep

    def hook(event, arguments):
        if event == "open":
            target, _, flags = arguments
            if not flags or not flags & WRITING:
                return
            if isinstance(target, str | bytes | os.PathLike):
                if os.path.realpath(os.fsdecode(target)).startswith(allowed):
                    return
            what = f"write to {target}"
        elif event.startswith(FORBIDDEN) and event not in HARMLESS:
            what = f"call {event}"
        else:
            return
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename == path:
                raise PermissionError(f"the grader does not let a file {what}")
            frame = frame.f_back

    def start_thread(thread):
        hook("_thread.start_new_thread", ())  # Python 3.11 does not audit it
        start(thread)

    start, threading.Thread.start = threading.Thread.start, start_thread
    sys.addaudithook(hook)


class Listener(io.TextIOBase):
    """In the place of standard output: remembers which line of a file printed first."""

    def __init__(self, path):
        self.path, self.line = path, None

    def write(self, text):
        frame = sys._getframe(1)
        while frame is not None and self.line is None:
            if frame.f_code.co_filename == self.path:
                self.line = frame.f_lineno
            frame = frame.f_back
        return len(text)
