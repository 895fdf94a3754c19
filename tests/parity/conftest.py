"""Compares with the limits, and prints how much of each was used."""

import json

import pytest

from tests.parity.reference import LIMITS

PROPERTY = "parity"


class Check:
    """`check(golden, limit, {what: deviation})`: each is within the limit."""

    def __init__(self, record):
        self.record = record

    def __call__(self, golden: str, limit: str, deviations: dict[str, float]):
        assert deviations, f"nothing was compared with {golden}"
        deviations = {what: float(d) for what, d in deviations.items()}
        worst = max(deviations, key=deviations.get)
        self.record(PROPERTY, json.dumps([golden, limit, deviations[worst], worst]))
        wrong = {what: d for what, d in deviations.items() if not d <= LIMITS[limit]}
        assert not wrong, f"{golden}: beyond {LIMITS[limit]:g} ({limit}): {wrong}"


@pytest.fixture
def check(record_property) -> Check:
    """Asserts that deviations are within their limit and reports the largest."""
    return Check(record_property)


def pytest_terminal_summary(terminalreporter):
    """The largest deviation of every golden against its limit."""
    worst = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == PROPERTY and report.when == "call":
                    golden, limit, deviation, what = json.loads(value)
                    old = worst.get((golden, limit), (-1.0, ""))
                    worst[golden, limit] = max(old, (deviation, what))
    if not worst:
        return
    terminalreporter.section("parity with the authors' network")
    row = "{:32} {:22} {:>9} {:>9} {:>6}  {}".format
    header = row("golden", "quantity", "largest", "limit", "share", "where")
    terminalreporter.write_line(header)
    for (golden, limit), (deviation, what) in sorted(worst.items()):
        share = f"{deviation / LIMITS[limit]:.0%}"
        numbers = f"{deviation:.2g}", f"{LIMITS[limit]:.0e}", share
        terminalreporter.write_line(row(golden, limit, *numbers, what))
