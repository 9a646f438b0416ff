"""What a command does around its work: Ctrl-C, and errors that are said in a sentence."""
import signal
import sys

from support.preferences import DataError

# The trainings at work that can save their state in the middle. Where there is one, Ctrl-C is only
# noted, and they end after the step at hand. A second Ctrl-C ends them at once.
trainings = []
asked_to_stop = False


def note(signum, frame):
    global asked_to_stop
    if asked_to_stop or not trainings:
        raise KeyboardInterrupt
    asked_to_stop = True


def run(main, again="The same command with --resume continues."):
    """Call main(). again: how one goes on after an interruption or a full disk."""
    sys.stdout.reconfigure(errors="replace")  # a sample may hold a character the terminal lacks
    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)  # how a machine that shuts down asks
    try:
        main()
    except DataError as error:
        raise SystemExit(f"error: {error}")
    except OSError as error:
        raise SystemExit(f"error: {error}\nWhat was saved before is whole. Remove the cause. "
                         f"{again}")
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted. {again}")
