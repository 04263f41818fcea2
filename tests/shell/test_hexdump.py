"""The hexdump that nbdsh shows for a long result, line by line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from nbd.shell import hexdump

ROW = bytes(range(0x3A, 0x4A))
BLOCK = 16 * 4096


def dump(data: bytes | bytearray, colour: bool = False) -> list[str]:
    return list(hexdump.dump(memoryview(data), colour=colour))


def test_a_row_has_its_offset_two_groups_of_hex_and_the_text() -> None:
    line = "00000000  3a 3b 3c 3d 3e 3f 40 41  42 43 44 45 46 47 48 49  |:;<=>?@ABCDEFGHI|"
    assert dump(ROW)[0] == line


def test_an_unprintable_byte_is_shown_as_a_dot() -> None:
    assert dump(b"\x00\x1f ~\x7f\x80\xff.")[0].endswith("|.. ~....|")


def test_the_last_line_is_the_length() -> None:
    assert dump(ROW + b"x")[-1] == "00000011"


def test_a_short_row_keeps_its_text_in_the_column() -> None:
    first, second, _ = dump(ROW + b"x")
    assert second.index("|") == first.index("|")


def test_rows_that_repeat_are_folded() -> None:
    lines = dump(ROW * 5 + b"-" * 16)
    assert [line[:8] for line in lines] == ["00000000", "*", "00000050", "00000060"]


def test_a_short_row_at_the_end_is_not_folded() -> None:
    lines = dump(bytes(40))
    assert [line[:8] for line in lines] == ["00000000", "*", "00000020", "00000028"]


@pytest.mark.parametrize("rows", [4095, 4096, 4097, 4098, 8193])
def test_a_long_run_is_folded_up_to_the_row_that_differs(rows: int) -> None:
    lines = dump(bytes(16 * rows) + ROW + bytes(16))
    end = 16 * rows
    offsets = ["00000000", "*", f"{end:08x}", f"{end + 16:08x}", f"{end + 32:08x}"]
    assert [line[:8] for line in lines] == offsets


def test_one_byte_that_differs_within_a_long_run_is_shown() -> None:
    data = bytearray(3 * BLOCK)
    data[2 * BLOCK - 1] = 0x41
    assert dump(data)[2].startswith(f"{2 * BLOCK - 16:08x}  00 00")


def test_thirty_two_lines_are_not_cut() -> None:
    lines = dump(bytes(range(256)) * 2)
    assert len(lines) == 33
    assert lines[-1] == "00000200"


def test_more_than_thirty_two_lines_are_cut_with_a_note() -> None:
    lines = dump(bytes(range(256)) * 3)
    assert len(lines) == 33
    assert lines[31].startswith("000001f0  ")
    assert lines[32] == "... 256 of 768 bytes not shown"


def test_a_folded_line_counts_as_one() -> None:
    lines = dump(bytes(4096) + bytes(range(256)) * 3)
    assert lines[1] == "*"
    assert lines[32] == f"... {768 - 30 * 16} of 4864 bytes not shown"


def test_colour_adds_only_escapes() -> None:
    data = bytes(64) + bytes(range(256)) * 3
    coloured = dump(data, colour=True)
    assert all(line.startswith("\x1b[2m") for line in coloured)
    assert [re.sub(r"\x1b\[\d*m", "", line) for line in coloured] == dump(data)


@pytest.mark.parametrize("size", [1, 8, 15, 16, 17, 31, 100, 511, 512])
def test_it_agrees_with_the_hexdump_command(size: int) -> None:
    command = shutil.which("hexdump")
    if command is None:
        pytest.skip("hexdump is not installed (Debian package: bsdextrautils)")
    data = os.urandom(size // 2) + bytes(size - size // 2)
    done = subprocess.run([command, "-C"], input=data, stdout=subprocess.PIPE, check=True)
    assert dump(data) == done.stdout.decode().splitlines()
