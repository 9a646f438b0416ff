"""pytest's options; they stand here because pytest reads no deeper conftest before it has parsed its command line."""
from hypothesis import Phase, settings

from exercises.grading import Grader, load


def pytest_addoption(parser):
    group = parser.getgroup("DPO from scratch")
    group.addoption("--impl", metavar="FILE", help="put the proofs to the functions of this file instead of dpo.py's")
    group.addoption("--seed", type=int, default=0, help="random seed of every test (default 0); the claims hold for all")


def pytest_configure(config):
    config.addinivalue_line("markers", "grades(function): a proof that is also put to a student's function, see --impl")
    if config.getoption("--impl"):
        config.pluginmanager.register(Grader(load(config.getoption("--impl")), config.getoption("--impl")))
    # Everybody sees the same examples at seed 0; another seed draws others. No deadline: a slow machine is no counterexample.
    # A student is told which mistake it is, so there is no need to search for the smallest example that shows it.
    grading = any(isinstance(plugin, Grader) for plugin in config.pluginmanager.get_plugins())
    settings.register_profile("proofs", max_examples=50, deadline=None, derandomize=config.getoption("--seed") == 0, database=None,
                              report_multiple_bugs=False, phases=[Phase.generate] if grading else list(Phase))
    settings.load_profile("proofs")
