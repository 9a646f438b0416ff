"""pytest's options. They stand in this file because pytest reads its command line before it reads
tests/conftest.py."""
import os
import signal
import sys

import pytest
from hypothesis import Phase, settings
from xdist.scheduler import LoadScopeScheduling


def pytest_addoption(parser):
    group = parser.getgroup("DPO from scratch")
    group.addoption("--impl", metavar="FILE",
                    help="test the functions of this file in the place of dpo.py's functions")
    group.addoption("--bug", metavar="N", type=int,
                    help="run the tests with bug N of exercises/find_the_bug.py in effect")
    group.addoption("--claim", metavar="N", type=int,
                    help="run the proofs of claim N of docs/claims.md and say what they compare")
    group.addoption("--altered", action="store_true",
                    help="with --claim: alter the claim, so that its proof must fail")
    group.addoption("--claims", action="store_true", help="list the claims, and run nothing")
    group.addoption("--seed", type=int, default=0,
                    help="the random seed of every test; with any seed but 0, hypothesis draws "
                         "new examples (default: 0)")


def pytest_configure(config):
    # The processes of pytest-xdist ignore the interrupt that ends a student's endless loop.
    if "PYTEST_XDIST_WORKER" in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "grades(function): this proof also tests a student's "
                                       "function, see --impl")
    config.addinivalue_line("markers", "slow: a file that takes long; -m 'not slow' leaves it out")
    # The exercises and the claims are imported only where they are asked for.
    if config.getoption("--claim") is not None or config.getoption("--altered"):
        prove_claim(config, config.getoption("--claim"), config.getoption("--altered"))
    set_up_hypothesis(config)
    if not 0 <= config.getoption("--seed") < 2 ** 32:
        raise pytest.UsageError(f"--seed {config.getoption('--seed')} must be from 0 to 2**32 - 1")
    if config.getoption("--bug") is not None:
        put_bug_into_effect(config, config.getoption("--bug"))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """--claims and --impl print what they have to say. They run no tests in this process."""
    if config.getoption("--claims"):
        from claims import listed
        sys.stdout.reconfigure(encoding="utf-8")
        print(listed())
        return pytest.ExitCode.OK
    if config.getoption("--impl"):
        from exercises.grading import command
        sys.stdout.reconfigure(encoding="utf-8")
        options = ["--seed", str(config.getoption("--seed")), "-k", config.getoption("keyword")]
        return command(config.getoption("--impl"), options, config.getoption("verbose") > 0)
    use_all_cores(config)


def use_all_cores(config):
    """Where no file is named and pytest-xdist is not told otherwise, each core runs tests. -n 0
    runs all in this process. A process beside others has one core for its matrices, too."""
    option = config.option
    alone = option.file_or_dir or option.claim is not None or option.usepdb or option.collectonly
    if not alone and option.numprocesses is None and "PYTEST_XDIST_WORKER" not in os.environ:
        option.numprocesses = os.cpu_count()
    if option.numprocesses:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_make_scheduler(config, log):
    """A file is run by one process, since its tests share what they have trained. test_exercises.py
    takes half of the time. There only the tests with "accident" in their names share something."""
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            alone = file.endswith("test_exercises.py") and "accident" not in test
            return nodeid if alone else file
    return ByFile(config, log)


def pytest_report_header(config):
    number = config.getoption("--bug")
    return f"bug {number} is in effect: failures are wanted" if number else None


def prove_claim(config, number, altered):
    """Run the proofs of one claim alone. Their report takes the place of pytest's own output."""
    from claims import ROOT, Report, claim_numbered
    if number is None:
        raise pytest.UsageError("--altered needs the number of a claim, as in --claim 9 --altered")
    report = Report(claim_numbered(number), altered)
    config.pluginmanager.register(report)
    config.args = [str(ROOT / proof) for proof in report.proofs]
    option = config.option
    option.verbose, option.tbstyle, option.reportchars = -2, "no", ""
    option.disable_warnings = True


def put_bug_into_effect(config, number):
    from exercises.changes import in_effect
    from exercises.find_the_bug import bug
    try:
        effect = in_effect(bug(number))
    except SystemExit as error:
        raise pytest.UsageError(f"--bug {number}: {error}") from error
    effect.__enter__()
    config.add_cleanup(lambda: effect.__exit__(None, None, None))


def set_up_hypothesis(config):
    """With seed 0 everybody tests the same examples. There is no deadline: a slow machine proves
    nothing wrong. A grader wants only the verdict. So hypothesis does not look for the smallest
    example that fails. Nobody wants it to explain the example: that traces every line.
    """
    verdict_is_enough = any(getattr(plugin, "only_the_verdict", False)
                            for plugin in config.pluginmanager.get_plugins())
    settings.register_profile(
        "proofs", max_examples=50, deadline=None, database=None, report_multiple_bugs=False,
        derandomize=config.getoption("--seed") == 0,
        phases=[Phase.generate] if verdict_is_enough else
        [phase for phase in Phase if phase != Phase.explain])
    settings.load_profile("proofs")
