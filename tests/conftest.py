"""The table of faults, at the end of a session that tried some."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    rows = [value for report in reports for key, value in getattr(report, "user_properties", []) if key == "fault"]
    if not rows:
        return
    columns = ("fault", "fired", "detected_s", "culprit", "rounds_lost", "recovered")
    titles = ("fault", "fired?", "detected in", "culprit named", "rounds lost", "recovered")
    terminalreporter.section("fault matrix")
    for cells in (titles, *([_cell(column, row) for column in columns] for row in rows)):
        terminalreporter.write_line(f"{cells[0]:<36}" + "".join(f"{cell:<15}" for cell in cells[1:]))


def _cell(column: str, row: dict[str, Any]) -> str:
    value = row.get(column, "no")
    return f"{value:.1f} s" if isinstance(value, float) else str(value)
