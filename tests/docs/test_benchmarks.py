"""The benchmarks run and report measurements; no test asserts how fast anything is."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_a_quick_round_of_one_workload_writes_its_samples_as_json(tmp_path: Path) -> None:
    """`handles` needs no server and takes only a moment."""
    out = tmp_path / "out.json"
    options = ["--quick", "--rounds=1", "--only=handles", f"--json={out}"]
    (tmp_path / "venv").symlink_to(sys.prefix)
    python = f"venv/bin/{Path(sys.executable).name}"
    command = [sys.executable, str(BENCHMARKS / "run.py"), *options, f"api={python}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert list(document["workloads"]) == ["handles"]
    (sample,) = document["workloads"]["handles"]["rounds"]["api"]
    assert sample["operations"] > 0
    assert sample["wall"] > 0


def test_every_workload_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/README.md says what an operation of each workload is, by name or by pattern."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan = importlib.import_module("plan")
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    first_cells = [row.split("|")[1] for row in text.splitlines() if row.startswith("| ")]
    patterns = [name.strip() for cell in first_cells for name in cell.split(",")]
    names = [workload.name for workload in plan.workloads([], quick=False)]
    assert [n for n in names if not any(fnmatchcase(n, pattern) for pattern in patterns)] == []


def test_every_kind_of_workload_exists_in_python_and_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs are given the same command line."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan, workloads = importlib.import_module("plan"), importlib.import_module("workloads")
    others = {"import", plan.WHOLE_COPY}
    measured = [w for w in plan.workloads([], quick=False) if w.kind not in others]
    in_c = {workload.kind for workload in measured if not workload.python_only}
    assert {workload.kind for workload in measured} | {"fill"} == set(workloads.KINDS)
    source = (BENCHMARKS / "limit.c").read_text(encoding="utf-8")
    assert [kind for kind in sorted(in_c) if f'{{"{kind}", ' not in source] == []
