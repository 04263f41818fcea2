# SPDX-License-Identifier: LGPL-2.0-or-later
"""The samples that were measured, and the figures computed from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from plan import Workload
from readers import Counts
from subjects import Sample, Subject

# Which subject is compared with which, where both are measured.  Any other is compared with libnbd.
_PAIRS = (
    *(("api", "base"), ("api", "libnbd"), ("api", "C"), ("abi", "api")),
    *(("pypy", "libnbd"), ("pypy-abi", "pypy")),
)


@dataclass(frozen=True)
class Figure:
    """A value, and half of the distance between the quartiles of the rounds that it comes from."""

    value: float
    spread: float


def summary(values: Sequence[float]) -> Figure | None:
    """The median of the rounds, if there are any."""
    if not values:
        return None
    if len(values) == 1:
        return Figure(values[0], 0.0)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(middle, (high - low) / 2)


@dataclass
class Results:
    """The samples of every round; None stands for a run that failed."""

    workloads: list[Workload]
    subjects: list[Subject]
    rounds: int
    samples: dict[tuple[str, str], list[Sample | None]] = field(default_factory=dict)
    readers: dict[str, Counts] = field(default_factory=dict)

    def add(self, workload: Workload, subject: str, sample: Sample | None) -> None:
        """Keep the sample of one round."""
        self.samples.setdefault((workload.name, subject), []).append(sample)

    def _times(self, workload: Workload, subject: str, clock: str) -> list[float | None]:
        samples = self.samples.get((workload.name, subject), [])
        return [s[clock or workload.clock] / s["operations"] if s else None for s in samples]

    def time(self, workload: Workload, subject: str, clock: str = "") -> Figure | None:
        """Seconds per operation, by the workload's own clock unless another is given."""
        return summary([t for t in self._times(workload, subject, clock) if t is not None])

    def ratio(self, workload: Workload, subject: str, other: str, clock: str = "") -> Figure | None:
        """The median of the subject's times divided by the other's in the same rounds.

        The load of the machine changes from round to round.
        """
        ours, theirs = (self._times(workload, name, clock) for name in (subject, other))
        return summary([a / b for a, b in zip(ours, theirs) if a is not None and b is not None])

    def peak(self, workload: Workload, subject: str) -> float | None:
        """The peak memory of the subject's processes, in MiB."""
        samples = self.samples.get((workload.name, subject), [])
        return max((s["max_rss_kib"] / 1024 for s in samples if s), default=None)

    @property
    def columns(self) -> list[str]:
        """The names of the subjects that run more than whole copies."""
        return [subject.name for subject in self.subjects if not subject.is_copier]

    @property
    def rows(self) -> list[Workload]:
        """The workloads that every interpreter runs in the same way, once for each clock."""
        return [
            replace(workload, clock=clock)
            for workload in self.workloads
            if not workload.is_whole_copy
            for clock in (("wall", "cpu") if workload.clock == "both" else ("wall",))
        ]

    @property
    def whole_copies(self) -> list[Workload]:
        """The copies that are compared with other programs."""
        return [workload for workload in self.workloads if workload.is_whole_copy]

    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons that the measured subjects allow."""
        pairs = [pair for pair in _PAIRS if set(pair) <= set(self.columns)]
        if "libnbd" in self.columns:
            known = {name for pair in _PAIRS for name in pair}
            pairs += [(name, "libnbd") for name in self.columns if name not in known]
        return pairs
