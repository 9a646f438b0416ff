"""support/command.py: how a command of the project ends."""
import signal

import pytest

from data import DataError
from support import command


@pytest.fixture(autouse=True)
def handlers():
    """The signals' handlers are put back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.mark.parametrize("error, said", [
    (DataError("mine.jsonl, line 3: chosen is blank"), "error: mine.jsonl, line 3: chosen is"),
    (OSError(28, "No space left on device", "run/state.pt"), "No space left on device: 'run/state"),
    (KeyboardInterrupt(), "Interrupted. Do it again."),
])
def test_what_went_wrong_is_said_in_a_sentence(error, said):
    """And how one goes on. A bad file is not tried again."""
    def main():
        raise error
    with pytest.raises(SystemExit) as ended:
        command.run(main, again="Do it again.")
    assert said in str(ended.value)
    assert str(ended.value).endswith("Do it again.") != isinstance(error, DataError)


def test_a_mistake_in_the_code_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"):
        command.run(lambda: (_ for _ in ()).throw(ValueError("a bug")))


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_of_a_training(which, monkeypatch):
    """Outside of a training it ends the command at once. In a training it is noted, and the second
    one ends it at once."""
    monkeypatch.setattr(command, "asked_to_stop", False)
    came = []

    def main():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(which)
        monkeypatch.setattr(command, "trainings", ["one"])
        signal.raise_signal(which)
        came.append(command.asked_to_stop)
        signal.raise_signal(which)
        came.append("after the second")
    with pytest.raises(SystemExit, match="Interrupted"):
        command.run(main)
    assert came == [True]
