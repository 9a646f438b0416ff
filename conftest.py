"""pytest's options; they stand here because pytest reads no deeper conftest before it has parsed its command line."""
from hypothesis import Phase, settings

from exercises.find_the_bug import bug, in_effect
from exercises.grading import Grader, load


def pytest_addoption(parser):
    group = parser.getgroup("DPO from scratch")
    group.addoption("--impl", metavar="FILE", help="put the proofs to the functions of this file instead of dpo.py's")
    group.addoption("--bug", metavar="N", type=int, help="test the project with bug N of exercises/find_the_bug.py in effect")
    group.addoption("--seed", type=int, default=0, help="random seed of every test (default 0): torch's, and any but 0 lets hypothesis draw new examples")


def pytest_configure(config):
    config.addinivalue_line("markers", "grades(function): a proof that is also put to a student's function, see --impl")
    if config.getoption("--impl"):
        config.pluginmanager.register(Grader(load(config.getoption("--impl")), config.getoption("--impl")))
    # Everybody sees the same examples at seed 0; another seed draws others. No deadline: a slow machine is no counterexample.
    # Where only the verdict counts, there is no need to search for the smallest example that shows it.
    verdict = any(getattr(plugin, "only_the_verdict", False) for plugin in config.pluginmanager.get_plugins())
    settings.register_profile("proofs", max_examples=50, deadline=None, derandomize=config.getoption("--seed") == 0, database=None,
                              report_multiple_bugs=False, phases=[Phase.generate] if verdict else list(Phase))
    settings.load_profile("proofs")
    if config.getoption("--bug"):
        effect = in_effect(bug(config.getoption("--bug")))
        effect.__enter__()
        config.add_cleanup(lambda: effect.__exit__(None, None, None))


def pytest_report_header(config):
    return f"bug {config.getoption('--bug')} is in effect: failures are wanted" if config.getoption("--bug") else None
