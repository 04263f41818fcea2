# SPDX-License-Identifier: LGPL-2.0-or-later
"""The plot of whole copies: their wall and processor time, relative to nbdcopy's, as SVG."""

from __future__ import annotations

from collections.abc import Iterator

from results import Results

_COLORS = {"api": "#2b6cb0", "pypy": "#dd8a1f", "qemu-img": "#8a8f98"}
_NAMES = {"api": "nbd.copy, CPython", "pypy": "nbd.copy, PyPy", "qemu-img": "qemu-img convert"}
_PANELS = {"wall": ("Wall time", 140), "cpu": ("Processor time", 430)}
_WIDTH, _PANEL, _BAR, _TOP = 720, 240, 14, 74


def svg(results: Results) -> str:
    """Return the plot: a group of bars for each copy, and a line where nbdcopy's time is."""
    group = len(_COLORS) * _BAR + 14
    height = _TOP + len(results.whole_copies) * group
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height + 8}"'
        ' font-family="sans-serif" font-size="12">'
    )
    lines = [head, f'<rect width="{_WIDTH}" height="{height + 8}" fill="#fff"/>']
    for place, (subject, name) in enumerate(_NAMES.items()):
        x = 140 + place * 170
        lines.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{_COLORS[subject]}"/>')
        lines.append(f'<text x="{x + 18}" y="20">{name}</text>')
    for place, workload in enumerate(results.whole_copies):
        label = workload.name.replace("copy-", "").replace("-", " to ")
        y = _TOP + place * group
        lines.append(f'<text x="10" y="{y + 26}">{label}</text>')
    for clock in _PANELS:
        lines += _panel(results, clock, group, height)
    return "\n".join([*lines, "</svg>\n"])


def _panel(results: Results, clock: str, group: int, height: int) -> Iterator[str]:
    title, left = _PANELS[clock]
    bars = [
        (_TOP + row * group + place * _BAR, subject, figure.value)
        for row, workload in enumerate(results.whole_copies)
        for place, subject in enumerate(_COLORS)
        if (figure := results.ratio(workload, subject, "nbdcopy", clock))
    ]
    scale = _PANEL / max([1.5, *(value for _, _, value in bars)])
    one = f"{left + scale:.1f}"
    yield f'<text x="{left}" y="48" font-weight="bold">{title}, nbdcopy = 1</text>'
    yield f'<line x1="{one}" x2="{one}" y1="{_TOP - 16}" y2="{height}" stroke="#999"/>'
    for y, subject, value in bars:
        width = value * scale
        color = _COLORS[subject]
        yield f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" fill="{color}"/>'
        yield f'<text x="{left + width + 4:.1f}" y="{y + 10}" font-size="10">{value:.2f}</text>'
