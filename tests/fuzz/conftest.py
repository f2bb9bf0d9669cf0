"""Shows what came of the inputs where their number was asked for, as `make fuzz` does."""

import os

from tests.fuzz import trials


def pytest_terminal_summary(terminalreporter):
    if "FUZZ_INPUTS" in os.environ and trials.TALLIES:
        terminalreporter.write_line("\n" + trials.table())
