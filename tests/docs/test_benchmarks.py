"""The benchmarks run and report measurements; no test asserts how fast anything is."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from xml.etree import ElementTree

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
    assert list(document["samples"]) == ["handles api"]
    (sample,) = document["samples"]["handles api"]
    assert sample["operations"] > 0
    assert sample["wall"] > 0


def test_every_workload_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/README.md says what each workload and reader does, by name or by pattern."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan, readers = importlib.import_module("plan"), importlib.import_module("readers")
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    first_cells = [row.split("|")[1] for row in text.splitlines() if row.startswith("| ")]
    patterns = [n.strip().replace("\\", "") for cell in first_cells for n in cell.split(",")]
    names = [*(workload.name for workload in plan.workloads([], quick=False)), *readers.READERS]
    assert [n for n in names if not any(fnmatchcase(n, pattern) for pattern in patterns)] == []


def test_every_kind_of_workload_exists_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan, workloads = importlib.import_module("plan"), importlib.import_module("workloads")
    measured = {w.kind for w in plan.workloads([], quick=False)} - {"import", plan.WHOLE_COPY}
    assert measured | {"fill"} == set(workloads.KINDS)


def test_every_workload_of_c_is_one_that_it_can_tell_from_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """limit.c reads or writes, with commands that wait or with 64 in flight at most."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan = importlib.import_module("plan")
    in_c = [w for w in plan.workloads([], quick=False) if not (w.python_only or w.is_whole_copy)]
    assert {w.kind for w in in_c} == {
        *("pread", "pread-into", "pwrite", "aio-pread", "aio-pread-bytearray", "aio-pwrite")
    }
    assert max(w.depth for w in in_c) <= 64


def test_a_mounted_disk_reads_ahead_only_in_order_and_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    readers = importlib.import_module("readers")
    page, ahead = readers.PAGE, readers.AHEAD * readers.PAGE
    size = 10 * ahead
    assert readers.fetched([(5 * page, 10), (5 * page + 20, 10)], size) == (1, page)
    assert readers.fetched([(5 * page, page), (6 * page, 10)], size) == (2, page + ahead)
    assert readers.fetched([(5 * page - 1, 2)], size) == (1, 2 * page)
    assert readers.fetched([(page, ahead + page)], size) == (2, ahead + page)
    in_order = [(place, page) for place in range(0, size, page)]
    assert readers.fetched(in_order, size) == (10, size), "not past the end"


def test_tables_and_the_plot_are_written_between_their_marks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The text around the tables stays, and so do tables that the run did not measure."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan, report = importlib.import_module("plan"), importlib.import_module("report")
    results, subjects = importlib.import_module("results"), importlib.import_module("subjects")
    copies = plan.workloads(["copy-half-file"], quick=True)
    about = {"python": "CPython", "backend": "cffi"}
    both = [subjects.Subject(name, None, about) for name in ("api", "nbdcopy")]
    found = results.Results(copies, both, 1)
    for name, wall in ("api", 1.0), ("nbdcopy", 4.0):
        sample = {"operations": 1, "wall": wall, "cpu": wall, "max_rss_kib": 1024}
        found.add(copies[0], name, sample)
    (tmp_path / "README.md").write_text(
        "before\n<!-- copies -->\nold\n<!-- end -->\nafter\n<!-- readers -->\nkept\n<!-- end -->\n"
    )
    for _ in range(2):
        report.write(tmp_path, found)
        text = (tmp_path / "README.md").read_text()
        assert text.startswith("before\n<!-- copies -->\n```text\n")
        assert text.endswith("```\n<!-- end -->\nafter\n<!-- readers -->\nkept\n<!-- end -->\n")
        assert "old" not in text
        (row,) = [
            line for line in text.splitlines() if line.split()[:2] == ["copy-half-file", "api"]
        ]
        assert "0.25±0.00" in row
    plot = ElementTree.parse(tmp_path / "copies.svg")
    texts = [element.text for element in plot.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("0.25") == 2
    assert "half to file" in texts
