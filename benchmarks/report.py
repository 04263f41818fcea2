# SPDX-License-Identifier: LGPL-2.0-or-later
"""The tables on the terminal and the JSON document."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan import Workload
from results import API, Figure, Results
from subjects import NBDCOPY, Subject
from targets import COPY_TARGETS, TARGETS

COPY_CLOCKS = ("wall", "cpu")
_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


def seconds(value: float) -> str:
    """A duration with three significant digits."""
    unit, scale = next((u for u in _UNITS if value >= u[1]), _UNITS[-1])
    number = value / scale
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f} {unit}"


def verdict(figure: Figure, at_most: float | None) -> str:
    """Whether a ratio meets its target, as it would be rounded to print it."""
    if at_most is None:
        return ""
    return "ok" if round(figure.value, 2) <= at_most else "MISS"


def _cell(figure: Figure | None, at_most: float | None) -> str:
    if figure is None:
        return "-"
    cell = f"{figure.value:.2f}±{figure.spread:.2f}"
    if at_most is not None:
        cell += f" ≤{at_most:g} {verdict(figure, at_most)}"
    return cell


def align(rows: list[list[str]]) -> list[str]:
    """Rows as lines; the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in rows
    ]


def times_table(results: Results, columns: list[str]) -> list[str]:
    """Time per operation, one row for each workload."""
    rows = [["per operation", *columns]]
    for workload in results.rows:
        name = workload.name + (" (cpu)" if workload.clock == "cpu" else "")
        figures = [results.time(workload, subject) for subject in columns]
        rows.append([name, *(seconds(f.value) if f else "-" for f in figures)])
    return align(rows)


def ratios_table(results: Results) -> list[str]:
    """Ratios beside their targets, one row for each workload."""
    pairs = results.pairs()
    rows = [["ratio", *(f"{a}/{b}" for a, b in pairs)]]
    for workload in results.rows:
        row = TARGETS[workload.name]
        rows.append(
            [workload.name, *(_cell(results.ratio(workload, *p), row.at_most(*p)) for p in pairs)]
        )
    return align(rows) if pairs else []


def missed(results: Results) -> list[str]:
    """One line for each target that was not met."""
    lines = []
    for workload in results.rows:
        for subject, other in results.pairs():
            at_most = TARGETS[workload.name].at_most(subject, other)
            figure = results.ratio(workload, subject, other)
            if figure and verdict(figure, at_most) == "MISS":
                lines.append(f"{workload.name}: {subject}/{other} {_cell(figure, at_most)}")
    for workload in results.whole_copies:
        for clock in COPY_CLOCKS:
            at_most = getattr(COPY_TARGETS[workload.name], clock)
            figure = results.ratio(workload, API, NBDCOPY, clock)
            if figure and verdict(figure, at_most) == "MISS":
                lines.append(f"{workload.name}: {clock} {API}/{NBDCOPY} {_cell(figure, at_most)}")
    return lines


def copies_table(results: Results, subjects: list[Subject]) -> list[str]:
    """Wall and processor time, their ratios to nbdcopy, and peak memory of whole copies."""
    rows = [["whole copy", "", "wall", "cpu", "wall ratio", "cpu ratio", "memory"]]
    for workload in results.whole_copies:
        for subject in (s.name for s in subjects if s.runs(workload)):
            times = [results.time(workload, subject, clock) for clock in COPY_CLOCKS]
            row = [workload.name, subject, *(seconds(f.value) if f else "-" for f in times)]
            for clock in COPY_CLOCKS:
                target = COPY_TARGETS[workload.name] if subject == API else None
                figure = results.ratio(workload, subject, NBDCOPY, clock)
                row.append(_cell(figure, getattr(target, clock, None)))
            peak = results.peak(workload, subject)
            rows.append([*row, f"{peak:.0f} MiB" if peak else "-"])
    return ["", *align(rows)] if len(rows) > 1 else []


def text(results: Results, subjects: list[Subject], rounds: int) -> str:
    """Everything that is printed at the end."""
    columns = [s.name for s in subjects if not s.copies]
    lines = [f"{key}: {value}" for key, value in machine().items()]
    lines += [f"{s.name}: {', '.join(s.about.values())}" for s in subjects]
    if results.rows:
        lines += ["", *times_table(results, columns)]
    for workload in results.workloads:
        for subject in (s for s in subjects if s.copies == "copy" and s.runs(workload)):
            figure = results.time(workload, subject.name)
            if figure:
                lines.append(f"{workload.name}, {subject.name}: {seconds(figure.value)}")
    if results.rows and results.pairs():
        lines += ["", *ratios_table(results)]
    lines += copies_table(results, subjects)
    misses = missed(results)
    lines += ["", f"targets missed: {len(misses)}", *misses]
    how = "median" if results.stat == "median" else "minimum"
    lines += ["", f"{how} of the rounds ({rounds}) ± half of their interquartile range"]
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Where the figures come from."""
    model = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": f"{model}, {os.cpu_count()} logical",
        "kernel": f"{platform.system()} {platform.release()}",
        "load at the end": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _numbers(figure: Figure | None) -> dict[str, float] | None:
    return asdict(figure) if figure else None


def _ratio(results: Results, workload: Workload, pair: tuple[str, str]) -> dict[str, Any]:
    """What one subject was to another, and what it should be."""
    if workload.is_whole_copy:
        at_most = COPY_TARGETS[workload.name].wall if pair[0] == API else None
    else:
        at_most = TARGETS[workload.name].at_most(*pair)
    ratio = _numbers(results.ratio(workload, *pair))
    return {"subject": pair[0], "to": pair[1], "ratio": ratio, "at_most": at_most}


def document(results: Results, subjects: list[Subject], rounds: int) -> dict[str, Any]:
    """The same as JSON, with the sample of every round."""
    rows = {}
    for workload in results.workloads:
        pairs = results.pairs()
        if workload.is_whole_copy:
            pairs = [(s.name, NBDCOPY) for s in subjects if s.runs(workload) and not s.copies]
        rows[workload.name] = {
            "clock": workload.clock,
            "seconds_per_operation": {
                s.name: _numbers(results.time(workload, s.name))
                for s in subjects
                if s.runs(workload)
            },
            "ratios": [_ratio(results, workload, pair) for pair in pairs],
            "rounds": {
                s.name: results.samples[workload.name, s.name] for s in subjects if s.runs(workload)
            },
        }
    return {
        "machine": machine(),
        "subjects": {s.name: s.about for s in subjects},
        "stat": results.stat,
        "rounds": rounds,
        "workloads": rows,
    }
