# SPDX-License-Identifier: LGPL-2.0-or-later
"""A plot of the ratios to libnbd's own module, written as SVG without any library."""

from __future__ import annotations

import math
from html import escape

from plan import Workload
from report import seconds
from results import LIBNBD, Figure, Results

_COLOURS = ("#767676", "#0b6e99", "#6fb7d6", "#b5532a", "#e3a587", "#5a7d2b", "#a8c686")
_BAR = 9
_GAP = 12
_LEFT = 200
_PLOT = 560
_RIGHT = 70
_TOP = 74
_LOWEST, _HIGHEST = 0.125, 4.0
_TICKS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)


def _x(ratio: float) -> float:
    """Where a ratio lies on the logarithmic axis; what is beyond the ends lies at them."""
    inside = min(max(ratio, _LOWEST), _HIGHEST)
    return _LEFT + _PLOT * math.log(inside / _LOWEST) / math.log(_HIGHEST / _LOWEST)


def _text(x: float, y: float, words: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _bar(y: float, colour: str, figure: Figure) -> list[str]:
    """A bar from 1 to the ratio, a whisker over the quartiles, and the figure itself."""
    one, end = _x(1), _x(figure.value)
    left, width = min(one, end), max(abs(end - one), 1)
    middle = y + _BAR / 2
    beside = max(one, end, _x(figure.high)) + 4
    return [
        f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR - 1}" '
        f'fill="{colour}"/>',
        _line(_x(figure.low), middle, _x(figure.high), middle, "#222222"),
        _text(beside, y + _BAR - 1.5, f"{figure.value:.2f}", 'font-size="9"'),
    ]


def _group(results: Results, workload: Workload, subjects: list[str], y: float) -> list[str]:
    reference = results.time(workload, LIBNBD)
    duration = seconds(reference.value) if reference else ""
    middle = y + len(subjects) * _BAR / 2
    label = 'text-anchor="end"'
    parts = [
        _text(_LEFT - 10, middle - 1, workload.name, label + ' font-size="12"'),
        _text(_LEFT - 10, middle + 11, duration, label + ' font-size="10" fill="#666666"'),
    ]
    for index, subject in enumerate(subjects):
        figure = results.ratio(workload, subject, LIBNBD)
        if figure:
            colour = _COLOURS[index % len(_COLOURS)]
            parts += _bar(y + index * _BAR, colour, figure)
    return parts


def _legend(subjects: list[str]) -> list[str]:
    parts = [
        _text(
            12, 20, "Time per operation, libnbd's own module = 1; to the left is faster", _HEADING
        )
    ]
    x = float(_LEFT)
    for index, subject in enumerate(subjects):
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 17, 42, subject, 'font-size="12"'))
        x += 40 + 8 * len(subject)
    return parts


_HEADING = 'font-size="15" font-weight="bold"'


def _axis(bottom: float) -> list[str]:
    parts = []
    for tick in _TICKS:
        colour, width = ("#222222", 1.5) if tick == 1 else ("#dddddd", 1)
        parts.append(_line(_x(tick), _TOP - 8, _x(tick), bottom, colour, width))
        parts.append(_text(_x(tick), _TOP - 12, f"{tick:g}", 'text-anchor="middle" font-size="11"'))
    return parts


def svg(results: Results) -> str:
    """The whole picture; shorter bars to the left are faster."""
    subjects = [name for name in results.subjects if name != LIBNBD]
    step = len(subjects) * _BAR + _GAP
    bottom = _TOP + step * len(results.rows)
    width = _LEFT + _PLOT + _RIGHT
    parts = [*_legend(subjects), *_axis(bottom)]
    for index, workload in enumerate(results.rows):
        parts += _group(results, workload, subjects, _TOP + index * step + _GAP / 2)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 12}" '
            f'viewBox="0 0 {width} {bottom + 12}" font-family="sans-serif">',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )
