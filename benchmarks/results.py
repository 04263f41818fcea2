# SPDX-License-Identifier: LGPL-2.0-or-later
"""The samples that were measured, and the figures computed from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from plan import Workload
from subjects import Sample, Subject

# Which subject is compared with which, where both are measured.  Any other is compared with libnbd.
_PAIRS = (
    *(("api", "base"), ("api", "libnbd"), ("api", "C"), ("abi", "api")),
    *(("pypy", "libnbd"), ("pypy-abi", "pypy")),
)


@dataclass(frozen=True)
class Figure:
    """A value with the quartiles of the rounds that it comes from."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles."""
        return (self.high - self.low) / 2


def summary(values: Sequence[float], stat: str) -> Figure:
    """The median or the minimum of the rounds."""
    value = min(values) if stat == "min" else statistics.median(values)
    if len(values) == 1:
        return Figure(value, value, value)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(value, low, high)


@dataclass
class Results:
    """The samples of every round; None stands for a run that failed."""

    workloads: list[Workload]
    subjects: list[Subject]
    stat: str = "median"
    samples: dict[tuple[str, str], list[Sample | None]] = field(default_factory=dict)

    def add(self, workload: Workload, subject: str, sample: Sample | None) -> None:
        """Keep the sample of one round."""
        self.samples.setdefault((workload.name, subject), []).append(sample)

    def _times(self, workload: Workload, subject: str, clock: str) -> list[float | None]:
        samples = self.samples.get((workload.name, subject), [])
        return [s[clock or workload.clock] / s["operations"] if s else None for s in samples]

    def time(self, workload: Workload, subject: str, clock: str = "") -> Figure | None:
        """Seconds per operation, by the workload's own clock unless another is given."""
        times = [t for t in self._times(workload, subject, clock) if t is not None]
        return summary(times, self.stat) if times else None

    def ratio(self, workload: Workload, subject: str, other: str, clock: str = "") -> Figure | None:
        """The subject's time divided by the other's.

        This is the median of the ratios of the rounds, because the load of the machine changes from
        round to round.  With ``min`` it is the ratio of the minima.
        """
        ours, theirs = (self._times(workload, name, clock) for name in (subject, other))
        rounds = [a / b for a, b in zip(ours, theirs) if a is not None and b is not None]
        if not rounds:
            return None
        figure = summary(rounds, "median")
        if self.stat == "median":
            return figure
        best = min(t for t in ours if t is not None) / min(t for t in theirs if t is not None)
        return Figure(best, figure.low, figure.high)

    def peak(self, workload: Workload, subject: str) -> float | None:
        """The peak memory of the subject's processes, in MiB."""
        samples = self.samples.get((workload.name, subject), [])
        return max((s["max_rss_kib"] / 1024 for s in samples if s), default=None)

    @property
    def columns(self) -> list[str]:
        """The names of the subjects that run more than whole copies."""
        return [subject.name for subject in self.subjects if not subject.is_nbdcopy]

    @property
    def rows(self) -> list[Workload]:
        """The workloads that every interpreter runs in the same way."""
        return [workload for workload in self.workloads if not workload.is_whole_copy]

    @property
    def whole_copies(self) -> list[Workload]:
        """The copies that are compared with nbdcopy."""
        return [workload for workload in self.workloads if workload.is_whole_copy]

    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons that the measured subjects allow."""
        pairs = [pair for pair in _PAIRS if set(pair) <= set(self.columns)]
        if "libnbd" in self.columns:
            known = {name for pair in _PAIRS for name in pair}
            pairs += [(name, "libnbd") for name in self.columns if name not in known]
        return pairs
