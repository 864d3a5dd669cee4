"""A pytest plugin: every test that has ended is a JSON line in a file, so that a run that is
stopped has said what it did."""

import json
import os

from cases import LOST_DEVICE, device_is_lost


def pytest_addoption(parser):
    parser.addoption("--case-lines", metavar="FILE")


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker())
    else:  # the workers' reports come here
        config.pluginmanager.register(_Writer(config.getoption("--case-lines")))


class _Worker:
    def pytest_runtest_logreport(self, report):
        """A worker that a test has lost the GPU of makes place for another."""
        if report.failed and device_is_lost():
            os._exit(LOST_DEVICE)


class _Writer:
    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        line = {"case": report.nodeid, "status": "ok", "seconds": round(report.duration, 3)}
        if report.skipped:
            line |= {"status": "unable", "error": str(report.longrepr[-1])[:300]}
        elif report.failed:
            text = " ".join(report.longreprtext.splitlines()[-3:])
            line |= {"status": "exception", "error": text[:300]}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
