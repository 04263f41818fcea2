# SPDX-License-Identifier: LGPL-2.0-or-later
"""The tables on the terminal, and the JSON document."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from results import Figure, Results
from subjects import NBDCOPY

_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


def seconds(figure: Figure | None) -> str:
    """Format a duration with three significant digits."""
    if figure is None:
        return "-"
    unit, scale = next((u for u in _UNITS if figure.value >= u[1]), _UNITS[-1])
    number = figure.value / scale
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f} {unit}"


def ratio(figure: Figure | None) -> str:
    """Format a ratio with its spread."""
    return f"{figure.value:.2f}±{figure.spread:.2f}" if figure else "-"


def align(rows: list[list[str]]) -> list[str]:
    """Format rows as lines, with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def times_table(results: Results) -> list[str]:
    """Time per operation, one row for each workload."""
    rows = [["per operation", *results.columns]]
    for workload in results.rows:
        name = workload.name + (" (cpu)" if workload.clock == "cpu" else "")
        rows.append([name, *(seconds(results.time(workload, one)) for one in results.columns)])
    return ["", *align(rows)] if results.rows else []


def ratios_table(results: Results) -> list[str]:
    """Ratios of the subjects, one row for each workload."""
    pairs = results.pairs()
    rows = [["ratio", *(f"{a}/{b}" for a, b in pairs)]]
    for workload in results.rows:
        rows.append([workload.name, *(ratio(results.ratio(workload, *pair)) for pair in pairs)])
    return ["", *align(rows)] if pairs and results.rows else []


def copies_table(results: Results) -> list[str]:
    """Wall and processor time of whole copies, their ratios to nbdcopy, and peak memory."""
    rows = [["whole copy", "", "wall", "cpu", "wall ratio", "cpu ratio", "memory"]]
    for workload in results.whole_copies:
        for subject in (s.name for s in results.subjects if s.runs(workload)):
            row = [workload.name, subject]
            row += [seconds(results.time(workload, subject, c)) for c in ("wall", "cpu")]
            row += [ratio(results.ratio(workload, subject, NBDCOPY, c)) for c in ("wall", "cpu")]
            peak = results.peak(workload, subject)
            rows.append([*row, f"{peak:.0f} MiB" if peak else "-"])
    return ["", *align(rows)] if results.whole_copies else []


def text(results: Results, rounds: int) -> str:
    """Everything that is printed at the end."""
    lines = [f"{key}: {value}" for key, value in machine().items()]
    lines += [f"{s.name}: {', '.join(s.about.values())}" for s in results.subjects]
    lines += [*times_table(results), *ratios_table(results), *copies_table(results)]
    how = "median" if results.stat == "median" else "minimum"
    lines += ["", f"{how} of the rounds ({rounds}) ± half of their interquartile range"]
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Describe the machine that the figures come from."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.is_file() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": f"{model}, {os.cpu_count()} logical",
        "kernel": f"{platform.system()} {platform.release()}",
        "load at the end": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def document(results: Results, rounds: int) -> dict[str, Any]:
    """The sample of every round, as JSON."""
    return {
        "machine": machine(),
        "subjects": {s.name: s.about for s in results.subjects},
        "rounds": rounds,
        "workloads": {
            workload.name: {
                "clock": workload.clock,
                "rounds": {
                    s.name: results.samples[workload.name, s.name]
                    for s in results.subjects
                    if s.runs(workload)
                },
            }
            for workload in results.workloads
        },
    }
