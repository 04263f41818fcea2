"""nbdsh on a terminal, as a person uses it, through a pseudo-terminal."""

from __future__ import annotations

import os
import re
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from support import shadows
from support.forks import forks
from support.servers import StartServer

import nbd

pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")

SCRIPT = str(Path(sys.executable).with_name("nbdsh"))
PROMPT = "nbd> "
CONTROLS = re.compile(r"\r|\x1b(\[[0-9;?]*[A-Za-z]|[=>])")
UP = "\x10"  # Ctrl-P: every line editor treats it like the arrow key

pytestmark = forks  # pexpect forks for each terminal

Open = Callable[..., "Session"]


class Session:
    """A running nbdsh, and the other side of its terminal."""

    def __init__(self, args: tuple[str, ...], environment: dict[str, str], cwd: Path) -> None:
        self.child = pexpect.spawn(
            SCRIPT,
            list(args),
            env=environment,
            cwd=str(cwd),
            encoding="utf-8",
            timeout=30,
            dimensions=(50, 120),
            # A test run in the background may ignore SIGINT, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.child.delaybeforesend = None

    def prompt(self) -> str:
        """Wait for the prompt; return the output before it, without terminal controls."""
        self.child.expect_exact(PROMPT)
        return CONTROLS.sub("", self.child.before)

    def ask(self, line: str) -> str:
        """Type a line; return its echo and the output."""
        self.child.sendline(line)
        return self.prompt()

    def interrupt(self) -> str:
        """Type Ctrl-C, wait for the prompt, and return the output before it."""
        # Again after a second: GNU readline misses a signal that arrives just before it waits
        # for a key.
        for _ in range(30):
            self.child.sendintr()
            if self.child.expect_exact([PROMPT, pexpect.TIMEOUT], timeout=1) == 0:
                break
        return str(self.child.before)

    def end(self) -> int | None:
        """Wait until nbdsh has ended; return its exit status."""
        self.child.expect(pexpect.EOF)
        return self.child.wait()  # type: ignore[no-any-return]

    def close(self) -> None:
        """End nbdsh if it is running."""
        if self.child.isalive():
            self.child.kill(signal.SIGKILL)
            self.child.wait()
        self.child.ptyproc.delayafterclose = 0
        self.child.close()


def require_terminals() -> None:
    try:
        ends = os.openpty()
    except OSError as error:
        pytest.skip(f"no pseudo-terminal can be opened here: {error}")
    for end in ends:
        os.close(end)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Open]:
    """Return a function that starts nbdsh with its own home, by default without colour."""
    require_terminals()
    sessions: list[Session] = []

    def start(*args: str, cwd: Path = tmp_path, **variables: str) -> Session:
        environment = {**os.environ, "TERM": "xterm", "HOME": str(tmp_path), "NO_COLOR": "1"}
        for name in ("LIBNBD_DEBUG", "XDG_STATE_HOME", "NBDSH_HISTORY"):
            environment.pop(name, None)
        sessions.append(Session(args, {**environment, **variables}, cwd))
        return sessions[-1]

    yield start
    for opened in sessions:
        opened.close()


@pytest.fixture
def uri(nbdkit: StartServer) -> str:
    """Return the URI of an empty disk of 1 MiB."""
    return str(nbdkit("memory", "1M").uri)


# ---- banner, prompt, end


def test_the_banner_names_the_library_and_says_how_to_connect(session: Open) -> None:
    banner = session().prompt()
    assert f"libnbd {nbd.NBD().get_version()}" in banner
    assert "a handle, not connected" in banner
    assert 'h.connect_uri("nbd://localhost")' in banner


@pytest.mark.parametrize(
    ("options", "state"),
    [
        (["-n"], "h = nbd.NBD()"),
        (["--opt-mode"], "h.opt_go()"),
        (["--uri", "URI"], "a handle, connected"),
        (["--opt-mode", "--uri", "URI"], "a handle, negotiating options"),
    ],
)
def test_the_banner_shows_the_state_of_the_handle(
    session: Open, uri: str, options: list[str], state: str
) -> None:
    words = [uri if word == "URI" else word for word in options]
    assert state in session(*words).prompt()


def test_results_are_shown_and_the_last_one_is_kept(session: Open, uri: str) -> None:
    shell = session("-u", uri)
    shell.prompt()
    assert "1048576" in shell.ask("h.get_size()")
    assert "524288" in shell.ask("_ // 2")


def test_an_error_shows_its_traceback_and_the_session_continues(session: Open) -> None:
    shell = session()
    shell.prompt()
    shown = shell.ask("h.get_size()")
    assert ", in get_size\n" in shown
    assert "nbd.Error: nbd_get_size: " in shown
    assert "42" in shell.ask("6 * 7")


def test_a_block_has_a_prompt_of_its_own(session: Open) -> None:
    shell = session()
    shell.prompt()
    shell.child.sendline("for i in range(2):")
    shell.child.expect_exact("...  ")
    shell.child.sendline("    print(i + 70)")
    shell.child.expect_exact("...  ")
    assert "70\n71\n" in shell.ask("")


def test_control_d_leaves(session: Open) -> None:
    shell = session()
    shell.prompt()
    shell.child.sendeof()
    assert shell.end() == 0


def test_exit_leaves_with_its_status(session: Open) -> None:
    shell = session()
    shell.prompt()
    shell.child.sendline("exit(3)")
    assert shell.end() == 3


def test_a_connection_that_fails_ends_before_the_banner(session: Open, tmp_path: Path) -> None:
    shell = session("-u", f"nbd+unix:///?socket={tmp_path}/none")
    assert shell.end() == 1
    assert shell.child.before.startswith("nbdsh: command line script failed: nbd_connect_uri: ")


def test_control_c_drops_the_line_and_returns_to_the_prompt(session: Open) -> None:
    shell = session()
    shell.prompt()
    shell.child.send("z")
    shell.child.expect_exact("z")
    assert "KeyboardInterrupt" in shell.interrupt()
    assert "NameError" not in shell.ask("6 * 7")


def test_control_c_stops_the_running_statement_and_returns_to_the_prompt(session: Open) -> None:
    shell = session()
    shell.prompt()
    # A loop, not a sleep, which would miss a signal that arrives just before it.
    shell.child.sendline("print('run' + 'ning'); exec('while True: pass')")
    shell.child.expect_exact("running")
    assert "KeyboardInterrupt" in shell.interrupt()
    assert "42" in shell.ask("6 * 7")


def test_control_c_stops_a_read_that_hangs_and_the_handle_can_be_used(
    session: Open, nbdkit: StartServer
) -> None:
    server = nbdkit("memory", "1M")
    shell = session("-u", server.uri)
    shell.prompt()
    server.pause()
    shell.child.sendline("print('rea' + 'ds'); h.pread(512, 0)")
    shell.child.expect_exact("reads")
    assert "KeyboardInterrupt" in shell.interrupt()
    assert "1048576" in shell.ask("h.get_size()")
    server.resume()
    assert r"\x00\x00\x00\x00" in shell.ask("h.pread(4, 0)")


# ---- bytes


@pytest.mark.parametrize(
    "expression",
    [
        "bytes(range(65))",
        "bytearray(range(65))",
        "memoryview(bytes(range(65)))",
        "memoryview(bytes(range(65)) + bytes(3)).cast('I').toreadonly()",
        "nbd.Buffer.from_bytearray(bytearray(range(65)))",
    ],
    ids=["bytes", "bytearray", "memoryview", "memoryview of integers", "nbd.Buffer"],
)
def test_a_long_result_is_dumped(session: Open, expression: str) -> None:
    shell = session()
    shell.prompt()
    row = "00000020  20 21 22 23 24 25 26 27  28 29 2a 2b 2c 2d 2e 2f  | !\"#$%&'()*+,-./|"
    assert row in shell.ask(expression).splitlines()


def test_a_read_is_dumped_with_repeated_rows_folded(session: Open, uri: str) -> None:
    shell = session("-u", uri)
    shell.prompt()
    shell.ask("h.pwrite(b'boot', 4096)")
    shown = shell.ask("h.pread(8192, 0)")
    offsets = re.findall(r"^([0-9a-f]{8}|\*)(?: |$)", shown, re.MULTILINE)
    assert offsets == ["00000000", "*", "00001000", "00001010", "*", "00002000"]
    assert "|boot............|\n" in shown


def test_the_dumped_value_is_kept(session: Open) -> None:
    shell = session()
    shell.prompt()
    shell.ask("bytes(4242)")
    assert "4242" in shell.ask("len(_)")


@pytest.mark.parametrize("expression", ["bytes(64)", "print(bytes(65))", "[bytes(65)]"])
def test_other_results_are_shown_as_python_shows_them(session: Open, expression: str) -> None:
    shell = session()
    shell.prompt()
    assert "\\x00\\x00\\x00" in shell.ask(expression)


def test_a_view_with_gaps_is_shown_as_python_shows_it(session: Open) -> None:
    shell = session()
    shell.prompt()
    assert "<memory at " in shell.ask("memoryview(bytes(200))[::2]")


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({"NO_COLOR": ""}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "", "TERM": "dumb"}, False),
    ],
    ids=["terminal", "NO_COLOR", "dumb terminal"],
)
def test_a_dump_has_colour(session: Open, variables: dict[str, str], coloured: bool) -> None:
    shell = session(**variables)
    shell.prompt()
    assert "00000000" in shell.ask("bytes(65)")
    assert ("\x1b[2m00000000" in shell.child.before) == coloured


# ---- completion and history


def test_tab_completes_a_method(session: Open) -> None:
    shell = session()
    shell.prompt()
    shell.ask("h.set_handle_na\t'tab' 'bed')")
    assert "'tabbed'" in shell.ask("h.get_handle_name()")


def test_tab_completes_a_constant(session: Open) -> None:
    shell = session()
    shell.prompt()
    assert "'base:allocation'" in shell.ask("nbd.CONTEXT_B\t")


def test_tab_twice_lists_the_completions(session: Open) -> None:
    shell = session()
    shell.prompt()
    shell.child.send("nbd.CMD_FLAG_\t\t")
    shell.child.expect_exact("CMD_FLAG_FUA")


def history_after(session: Open, line: str, **variables: str) -> None:
    shell = session(**variables)
    shell.prompt()
    shell.ask(line)
    shell.child.sendline("exit()")
    assert shell.end() == 0


def test_history_is_kept_between_sessions(session: Open) -> None:
    history_after(session, "6 * 1111")
    shell = session()
    shell.prompt()
    assert "6666" in shell.ask(UP + UP)


def test_history_is_kept_when_the_session_ends_by_control_d(session: Open, tmp_path: Path) -> None:
    shell = session()
    shell.prompt()
    shell.ask("'a line'")
    shell.child.sendeof()
    shell.end()
    assert "'a line'" in (tmp_path / ".nbdsh_history").read_text()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o277, 0o777], ids=oct)
@pytest.mark.parametrize("mode", [None, 0o666, 0o644, 0o400], ids=["new", "666", "644", "400"])
def test_only_the_user_can_read_and_write_the_history(
    session: Open, tmp_path: Path, mask: int, mode: int | None
) -> None:
    path = tmp_path / ".nbdsh_history"
    if mode is not None:
        path.touch()
        path.chmod(mode)
    history_after(session, f"_ = os.umask({mask})")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().splitlines() == [f"_ = os.umask({mask})", "exit()"]


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({"NBDSH_HISTORY": "{}/mine"}, "mine"),
        ({"NBDSH_HISTORY": "~/mine"}, "mine"),
        ({"XDG_STATE_HOME": "{}/state"}, "state/nbdsh_history"),
        ({"XDG_STATE_HOME": "{}/state", "NBDSH_HISTORY": "{}/mine"}, "mine"),
    ],
)
def test_the_history_file_is_where_the_environment_says(
    session: Open, tmp_path: Path, variables: dict[str, str], path: str
) -> None:
    history_after(session, "'a line'", **{k: v.format(tmp_path) for k, v in variables.items()})
    assert "'a line'" in (tmp_path / path).read_text()
    assert not (tmp_path / ".nbdsh_history").exists()


def test_a_history_that_cannot_be_written_is_no_error(session: Open) -> None:
    history_after(session, "'a line'", NBDSH_HISTORY="/dev/null/none")


def test_the_umask_of_the_session_stays(session: Open) -> None:
    shell = session()
    shell.prompt()
    shell.ask("import atexit")
    shell.ask("_ = os.umask(0o123); atexit.register(lambda: print(oct(os.umask(0)), 'at exit'))")
    shell.child.sendeof()
    shell.child.expect_exact("0o123 at exit")
    assert shell.end() == 0


def test_the_history_may_be_a_link_to_a_file(session: Open, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "target").write_text("6 * 1111\n")
    (tmp_path / "target").chmod(0o644)
    shell = session(NBDSH_HISTORY=str(tmp_path / "link"))
    shell.prompt()
    assert "6666" in shell.ask(UP)
    shell.child.sendeof()
    shell.end()
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o600


def test_a_named_pipe_is_neither_read_nor_written_as_the_history(
    session: Open, tmp_path: Path
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = path.stat().st_mode
    history_after(session, "'a line'", NBDSH_HISTORY=str(path))
    assert (os.read(reader, 100), path.stat().st_mode) == (b"", mode)
    os.close(reader)


def test_a_link_to_a_device_is_not_followed_as_the_history(session: Open, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    mode = os.stat("/dev/zero").st_mode
    history_after(session, "'a line'", NBDSH_HISTORY=str(tmp_path / "link"))
    assert os.stat("/dev/zero").st_mode == mode
    assert os.readlink(tmp_path / "link") == "/dev/zero"


def test_a_folder_as_the_history_is_no_error(session: Open, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o755)
    history_after(session, "'a line'", NBDSH_HISTORY=str(tmp_path / "folder"))
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


# ---- a current folder with files named like modules


def test_a_session_imports_nothing_from_the_current_folder(session: Open, tmp_path: Path) -> None:
    folder = shadows.make(tmp_path)
    for _ in range(2):  # the second session has a history
        shell = session(cwd=folder, PAGER="cat")
        shell.prompt()
        assert "Help on function get_size" in shell.ask("help(nbd.NBD.get_size)")
        assert '"if" statement' in shell.ask("help('if')")
        assert "NameError: name 'prnt'" in shell.ask("prnt('é')")
        assert "ZeroDivisionError" in shell.ask("1 / 0")
        assert "SyntaxError" in shell.ask("x = = 2")
        assert "nbd.Error: nbd_get_size: " in shell.ask("h.get_size()")
        assert "00000000  00 00" in shell.ask("nbd.Buffer(1 << 20)")
        assert "'base:allocation'" in shell.ask("nbd.CONTEXT_B\t")
        assert "TypeError: addr: the port must" in shell.ask("h.aio_connect(('localhost', '1'))")
        shell.child.sendeof()
        assert shell.end() == 0
    assert shadows.taken_from(folder) == []


def test_a_statement_imports_from_the_current_folder_first(session: Open, tmp_path: Path) -> None:
    (tmp_path / "wave.py").write_text("print('mi' + 'ne')\n")
    shell = session()
    shell.prompt()
    assert "mine" in shell.ask("import wave")
