# SPDX-License-Identifier: LGPL-2.0-or-later
"""The tables on the terminal and in README.md, the plot, and the JSON document."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import plot
from plan import Workload
from results import Figure, Results

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


def row_name(workload: Workload) -> str:
    """The name of a row, and its clock if that is not the usual one."""
    return workload.name + (" (cpu)" if workload.clock == "cpu" else "")


def times_table(results: Results) -> list[str]:
    """Time per operation, one row for each workload."""
    rows = [["per operation", *results.columns]]
    for workload in results.rows:
        rows.append(
            [row_name(workload), *(seconds(results.time(workload, one)) for one in results.columns)]
        )
    return align(rows) if results.rows else []


def ratios_table(results: Results) -> list[str]:
    """Ratios of the subjects, one row for each workload."""
    pairs = results.pairs()
    rows = [["ratio", *(f"{a}/{b}" for a, b in pairs)]]
    for workload in results.rows:
        rows.append([row_name(workload), *(ratio(results.ratio(workload, *p)) for p in pairs)])
    return align(rows) if pairs and results.rows else []


def copies_table(results: Results) -> list[str]:
    """Wall and processor time of whole copies, their ratios to nbdcopy, and peak memory."""
    ratios = [("wall", "nbdcopy"), ("cpu", "nbdcopy"), ("wall", "api")]
    rows = [["whole copy", "", "wall", "cpu", *(f"{c}/{other}" for c, other in ratios), "memory"]]
    for workload in results.whole_copies:
        for subject in (s.name for s in results.subjects if s.runs(workload)):
            row = [workload.name, subject]
            row += [seconds(results.time(workload, subject, c)) for c in ("wall", "cpu")]
            row += [ratio(results.ratio(workload, subject, other, c)) for c, other in ratios]
            peak = results.peak(workload, subject)
            rows.append([*row, f"{peak:.0f} MiB" if peak else "-"])
    return align(rows) if results.whole_copies else []


def readers_table(results: Results) -> list[str]:
    """Requests and MiB of each reader: of a local file, by nbd.open, and by 128 KiB read-ahead."""
    rows = [["reader", "local reads", "MiB", "nbd.open", "MiB", "read-ahead", "MiB", "MiB ratio"]]
    for name, counts in results.readers.items():
        pairs = [counts[by] for by in ("local", "nbd", "ahead")]
        cells = [cell for n, size in pairs for cell in (str(n), f"{size / 2**20:.2f}")]
        rows.append([name, *cells, f"{counts['nbd'][1] / counts['ahead'][1]:.2f}"])
    return align(rows) if results.readers else []


def tables(results: Results) -> dict[str, list[str]]:
    """The tables that have rows."""
    both = [*times_table(results), "", *ratios_table(results)]
    named = {"operations": both, "copies": copies_table(results), "readers": readers_table(results)}
    return {name: table for name, table in named.items() if len(table) > 1}


def about(results: Results) -> list[str]:
    """What was measured, and where."""
    return [
        *(f"{key}: {value}" for key, value in machine().items()),
        *(f"{subject.name}: {', '.join(subject.about.values())}" for subject in results.subjects),
        f"medians of {results.rounds} rounds ± half of their interquartile range",
    ]


def text(results: Results) -> str:
    """Everything that is printed at the end."""
    return "\n".join(line for table in tables(results).values() for line in ["", *table])


def write(folder: Path, results: Results) -> None:
    """Replace the tables in README.md that were measured, and the plot."""
    readme = folder / "README.md"
    content = readme.read_text(encoding="utf-8")
    for name, lines in tables(results).items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, _, after = content.partition(begin)
        table = "\n".join(["```text", *about(results), "", *lines, "```\n"])
        content = before + begin + table + end + after.partition(end)[2]
    readme.write_text(content, encoding="utf-8")
    if results.whole_copies:
        (folder / "copies.svg").write_text(plot.svg(results), encoding="utf-8")


def machine() -> dict[str, str]:
    """Describe the machine that the figures come from."""
    known = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": f"{known[1] if known else platform.machine()}, {os.cpu_count()} logical",
        "kernel": f"{platform.system()} {platform.release()}",
        "load at the end": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def document(results: Results) -> dict[str, Any]:
    """The sample of every round, as JSON."""
    samples = {f"{name} {subject}": rounds for (name, subject), rounds in results.samples.items()}
    return {"about": about(results), "samples": samples, "readers": results.readers}
