"""A plugin of pytest: appends what came of each test, as a line of JSON, to the file that GPU_OUTCOMES names.

So that what was found is there also where the time runs out.
"""

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of the call, or of what came before it in its place."""
    by_a_worker = "PYTEST_XDIST_WORKER" in os.environ  # which tells the process that started it
    if by_a_worker or (report.when != "call" and report.passed):
        return
    line = {"test": report.nodeid, "seconds": round(report.duration, 3), "outcome": report.outcome}
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        line["why"] = (crash.message if crash else report.longreprtext.strip()).splitlines()[0]
    with open(os.environ["GPU_OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
