"""nbdsh as scripts and test suites run it: its options, output and exit status."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from support import shadows
from support.servers import StartServer

import nbd
from nbd._binding.build import BUNDLED

SCRIPT = [str(Path(sys.executable).with_name("nbdsh"))]
MODULE = [sys.executable, "-m", "nbd"]
IMPORTED = [sys.executable, "-c", "import nbdsh; nbdsh.shell()"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]

FAILED = "nbdsh: command line script failed: "
NO_HANDLE = "error: -n option cannot be used with --base-allocation, --opt-mode or --uri\n"


@pytest.fixture
def nbdsh(tmp_path: Path) -> Run:
    """Return a function that runs nbdsh in an empty folder and waits until it ends."""

    def run(
        *args: str,
        stdin: str = "",
        program: list[str] = SCRIPT,
        cwd: Path = tmp_path,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "80", "HOME": str(tmp_path), **variables}
        if "LIBNBD_DEBUG" not in variables:
            environment.pop("LIBNBD_DEBUG", None)
        return subprocess.run(
            [*program, *args],
            input=stdin,
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
            cwd=cwd,
            env=environment,
        )

    return run


@pytest.fixture
def uri(nbdkit: StartServer) -> str:
    """Return the URI of an empty disk of 1 MiB."""
    return str(nbdkit("memory", "1M").uri)


def printed(done: subprocess.CompletedProcess[str]) -> str:
    """Return the standard output of a run, which must succeed and write nothing to stderr."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return the standard error of a run, which must fail with status 1 and print nothing."""
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


# ---- ways to start it, and the environment of a command


@pytest.mark.parametrize("program", [SCRIPT, MODULE, IMPORTED], ids=["script", "-m", "import"])
def test_it_starts_as_script_module_and_function(nbdsh: Run, uri: str, program: list[str]) -> None:
    assert printed(nbdsh("-u", uri, "-c", "print(h.get_size())", program=program)) == "1048576\n"


@pytest.mark.parametrize("program", [SCRIPT, MODULE, IMPORTED], ids=["script", "-m", "import"])
def test_every_start_gives_the_exit_status(nbdsh: Run, program: list[str]) -> None:
    assert nbdsh("-c", "h.get_size()", program=program).returncode == 1


def test_the_handle_has_the_shells_name(nbdsh: Run) -> None:
    assert printed(nbdsh("-c", "print(h.get_handle_name())")) == "nbdsh\n"


def test_commands_share_one_namespace(nbdsh: Run) -> None:
    commands = (
        "x = 20",
        "def f(): return x",
        "class C: y = [x + i for i in range(2)]",
        "print(x, f(), C.y, [x for _ in range(2)], (lambda: f())())",
    )
    options = [word for command in commands for word in ("-c", command)]
    assert printed(nbdsh(*options)) == "20 20 [20, 21] [20, 20] 20\n"


def test_a_function_sees_a_name_that_a_later_command_sets(nbdsh: Run) -> None:
    done = nbdsh("-c", "def f(): return late", "-c", "late = 3", "-c", "print(f())")
    assert printed(done) == "3\n"


def test_os_and_sys_are_there_as_in_the_shell_of_libnbd(nbdsh: Run) -> None:
    assert printed(nbdsh("-c", "print(os.sep, sys.maxsize > 0)")) == "/ True\n"


def test_a_command_can_have_many_lines(nbdsh: Run) -> None:
    assert (
        printed(nbdsh("-c", "\nfor i in range(2):\n    print(i)\n\nprint('end')\n"))
        == "0\n1\nend\n"
    )


def test_commands_are_not_compiled_with_the_shells_own_future_imports(nbdsh: Run) -> None:
    done = nbdsh("-c", "def f(x: int): pass", "-c", "print(f.__annotations__['x'] is int)")
    assert printed(done) == "True\n"


def test_a_class_of_a_command_finds_its_module(nbdsh: Run) -> None:
    source = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Extent:\n"
        "    length: int\n"
        "print(Extent(3), Extent.__module__)\n"
    )
    assert printed(nbdsh("-c", "-", stdin=source)) == "Extent(length=3) nbdsh\n"


def test_a_command_can_import_from_the_current_folder(nbdsh: Run, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 5\n")
    assert printed(nbdsh("-c", "import beside; print(beside.value)")) == "5\n"


def test_standard_input_is_a_command(nbdsh: Run) -> None:
    source = "def f():\n    return nbd.CONTEXT_BASE_ALLOCATION\n\nprint(f())\n"
    assert printed(nbdsh("-c", "-", stdin=source)) == "base:allocation\n"


def test_standard_input_is_read_in_its_turn_and_only_once(nbdsh: Run) -> None:
    done = nbdsh("-c", "print(1)", "-c", "-", "-c", "print(3)", "-c", "-", stdin="print(2)")
    assert printed(done) == "1\n2\n3\n"


def test_results_of_commands_are_not_shown(nbdsh: Run) -> None:
    assert printed(nbdsh("-c", "bytes(100)", "-c", "1 + 1")) == ""


def test_a_print_of_bytes_is_not_dumped(nbdsh: Run) -> None:
    assert printed(nbdsh("-c", "print(b'x' * 100)")) == f"b'{'x' * 100}'\n"


# ---- options


@pytest.mark.parametrize(
    "option", [["-c"], ["--command"], ["--comm"]], ids=["short", "long", "prefix"]
)
def test_a_command_can_be_given_as(nbdsh: Run, option: list[str]) -> None:
    assert printed(nbdsh(*option, "print(7)")) == "7\n"


@pytest.mark.parametrize("option", ["-cprint(7)", "--command=print(7)"])
def test_a_command_can_be_joined_to_its_option(nbdsh: Run, option: str) -> None:
    assert printed(nbdsh(option)) == "7\n"


@pytest.mark.parametrize("option", ["-u", "--uri", "--ur", "--connect", "--conn"])
def test_a_uri_can_be_given_as(nbdsh: Run, uri: str, option: str) -> None:
    assert printed(nbdsh(option, uri, "-c", "print(h.get_size())")) == "1048576\n"


def test_options_act_in_the_order_given(nbdsh: Run, uri: str) -> None:
    state = "print(h.aio_is_created(), h.aio_is_ready())"
    assert printed(nbdsh("-c", state, "-u", uri, "-c", state)) == "True False\nFalse True\n"


def test_commands_before_one_that_fails_have_run(nbdsh: Run) -> None:
    done = nbdsh("-c", "print(1)", "-c", "h.get_size()", "-c", "print(2)")
    assert (done.returncode, done.stdout) == (1, "1\n")


def test_opt_mode_stops_at_the_negotiation(nbdsh: Run, uri: str) -> None:
    commands = ["-c", "print(h.aio_is_negotiating())", "-c", "h.opt_go(); print(h.get_size())"]
    assert printed(nbdsh("--opt-mode", "-u", uri, *commands)) == "True\n1048576\n"


def test_opt_mode_after_the_connection_is_too_late(nbdsh: Run, uri: str) -> None:
    assert failure(nbdsh("-u", uri, "--opt-mode")).startswith(f"{FAILED}nbd_set_opt_mode:")


def test_base_allocation_asks_for_the_context(nbdsh: Run, uri: str) -> None:
    command = "print(h.can_meta_context('base:allocation'))"
    assert printed(nbdsh("--base-allocation", "-u", uri, "-c", command)) == "True\n"


def test_the_options_act_on_the_first_handle(nbdsh: Run, uri: str) -> None:
    commands = ["-c", "old = h; h = None", "-u", uri, "-c", "print(old.aio_is_ready(), h)"]
    assert printed(nbdsh(*commands)) == "True None\n"


def test_n_makes_no_handle(nbdsh: Run) -> None:
    assert printed(nbdsh("-n", "-c", "print('h' in globals(), nbd.NBD)")).startswith("False <class")


@pytest.mark.parametrize("options", [["-u", "nbd://x"], ["--opt-mode"], ["--base-allocation"]])
def test_n_excludes_options_that_need_the_handle(nbdsh: Run, options: list[str]) -> None:
    assert failure(nbdsh("-n", "-c", "print(1)", *options)) == NO_HANDLE


def test_n_with_the_wrong_options_comes_before_the_version(nbdsh: Run) -> None:
    assert failure(nbdsh("--version", "-n", "--opt-mode")) == NO_HANDLE


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["-z"], "unrecognized arguments: -z"),
        (["word"], "unrecognized arguments: word"),
        (["-c"], "argument -c/--command: expected one argument"),
        (["--co", "x"], "ambiguous option: --co could match --command, --connect"),
        (["--opt-mode=1"], "argument --opt-mode: ignored explicit argument '1'"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(nbdsh: Run, args: list[str], message: str) -> None:
    done = nbdsh(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: nbdsh [-h] [--base-allocation] [-c COMMAND] [-n]")
    assert done.stderr.endswith(f"\nnbdsh: error: {message}\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["-V", "--vers"])
def test_version_shows_the_shell_the_library_and_this_build(nbdsh: Run, option: str) -> None:
    version = nbd.NBD().get_version()
    first, second, third, fourth = printed(nbdsh(option, "-c", "print('not run')")).splitlines()
    origin = ", from this package" if BUNDLED else ""
    assert (first, second) == (f"nbdsh {version}", f"libnbd {version}{origin}")
    assert re.fullmatch(rf"GnuTLS 3\.\d+\.\d+{origin}", fourth)
    python = f"{sys.implementation.name} {sys.version.split()[0]}"
    pattern = rf"libnbd-cffi \d\S* \({re.escape(python)}, cffi (API|ABI) mode\)"
    assert re.fullmatch(pattern, third, re.IGNORECASE)


def test_help_shows_every_option_but_the_hidden_ones(nbdsh: Run) -> None:
    described = re.findall(r"^  (-\S.*?)(?:  |$)", printed(nbdsh("--help")), re.MULTILINE)
    shown = {word.strip(",") for line in described for word in line.split() if word[0] == "-"}
    listed = printed(nbdsh("--short-options")) + printed(nbdsh("--long-options"))
    assert shown == {"-h", "--help", *listed.split()}


def test_help_says_where_the_manual_page_is(nbdsh: Run) -> None:
    text = printed(nbdsh("--help"))
    assert text.startswith("usage: nbdsh ")
    assert "help(nbd) is the manual page" in " ".join(text.split())


def test_the_options_for_completion_are_sorted_lines(nbdsh: Run) -> None:
    for option in ("--short-options", "--long-options"):
        lines = printed(nbdsh(option)).splitlines()
        assert lines == sorted(lines)


# ---- errors


def test_an_error_of_libnbd_is_one_line(nbdsh: Run) -> None:
    assert failure(nbdsh("-c", "raise nbd.Error('it broke', 5)")) == f"{FAILED}it broke\n"


def test_a_uri_without_a_server_gives_one_line(nbdsh: Run, tmp_path: Path) -> None:
    message = failure(nbdsh("-u", f"nbd+unix:///?socket={tmp_path}/none", "-c", "print(1)"))
    assert message == f"{FAILED}nbd_connect_uri: connect: No such file or directory\n"


def test_debugging_that_is_off_keeps_the_one_line(nbdsh: Run) -> None:
    message = failure(nbdsh("-c", "h.get_size()", LIBNBD_DEBUG="0"))
    assert message.startswith(f"{FAILED}nbd_get_size: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "variables"),
    [(["-v"], {}), (["--verbose"], {}), ([], {"LIBNBD_DEBUG": "1"})],
    ids=["-v", "--verbose", "LIBNBD_DEBUG"],
)
def test_debugging_shows_the_traceback(
    nbdsh: Run, options: list[str], variables: dict[str, str]
) -> None:
    message = failure(nbdsh(*options, "-c", "size = h.get_size()", **variables))
    assert FAILED not in message
    first = message.index("Traceback (most recent call last):\n")
    command = message.index('File "<command 1>", line 1, in <module>\n    size = h.get_size()\n')
    method = message.index(", in get_size\n")
    assert first < command < method < message.index("\nnbd.Error: nbd_get_size: ")


def test_verbose_writes_debugging_messages_to_stderr_alone(nbdsh: Run) -> None:
    done = nbdsh("-v", "-c", "print(h.get_debug(), os.environ['LIBNBD_DEBUG'])")
    assert (done.returncode, done.stdout) == (0, "True 1\n")
    assert 'nbd_set_handle_name: enter: handle_name="nbdsh"' in done.stderr


def test_another_exception_shows_the_frames_and_lines_of_the_commands(nbdsh: Run) -> None:
    message = failure(nbdsh("-c", "def f():\n    return 1 / 0", "-c", "x = 1\nf()"))
    shown = [line for line in message.splitlines() if not re.fullmatch(r"[ ~^]*", line)]
    assert shown == [
        "Traceback (most recent call last):",
        '  File "<command 2>", line 2, in <module>',
        "    f()",
        '  File "<command 1>", line 2, in f',
        "    return 1 / 0",
        "ZeroDivisionError: division by zero",
    ]


def test_a_frame_of_standard_input_has_its_line(nbdsh: Run) -> None:
    message = failure(nbdsh("-c", "-", stdin="x = 1\n\nx / 0\n"))
    assert '  File "<stdin>", line 3, in <module>\n    x / 0\n' in message


def test_a_closed_handle_is_an_ordinary_exception(nbdsh: Run) -> None:
    message = failure(nbdsh("-c", "h.close()", "-c", "h.get_size()"))
    assert "<command 2>" in message
    assert message.splitlines()[-1].startswith("nbd.ClosedHandle: ")


def test_a_command_that_does_not_compile_shows_where(nbdsh: Run) -> None:
    message = failure(nbdsh("-c", "print(1)\nx = = 2"))
    assert message.startswith('  File "<command 1>", line 2\n    x = = 2\n')
    assert message.splitlines()[-1].startswith("SyntaxError: ")


def test_a_hook_that_a_command_sets_is_left_alone(nbdsh: Run) -> None:
    hook = "sys.excepthook = lambda kind, error, trace: print('mine', file=sys.stderr)"
    assert failure(nbdsh("-c", hook, "-c", "1 / 0")) == "mine\n"


@pytest.mark.parametrize(
    ("program", "command"),
    [
        (SCRIPT, "exit()"),
        (SCRIPT, "exit(4)"),
        (SCRIPT, "quit(300)"),
        (SCRIPT, "import sys; sys.exit('bye')"),
        (SCRIPT, "raise SystemExit(3)"),
        (SCRIPT, "1 / 0"),
        (SCRIPT, "raise KeyboardInterrupt"),
        (MODULE, "exit(4)"),
        (MODULE, "raise KeyboardInterrupt"),
    ],
)
def test_the_end_of_a_command_has_the_status_of_a_python_program(
    nbdsh: Run, program: list[str], command: str
) -> None:
    python = nbdsh(command, program=[sys.executable, "-c"])
    done = nbdsh("-c", command, "-c", "pass", program=program)
    assert done.returncode == python.returncode
    assert done.stdout == python.stdout
    assert done.stderr.splitlines()[-1:] == python.stderr.splitlines()[-1:]


def test_exit_ends_before_the_next_command(nbdsh: Run) -> None:
    assert printed(nbdsh("-c", "exit()", "-c", "print(1)")) == ""


# ---- no command, and standard input that is not a terminal


def test_statements_on_a_pipe_run_without_banner_and_prompt(nbdsh: Run, uri: str) -> None:
    statements = "h.get_size()\nfor i in range(2):\n    print(i)\n\nbytes(65)\n"
    expected = f"1048576\n0\n1\n{bytes(65)!r}\n"
    assert printed(nbdsh("-u", uri, stdin=statements)) == expected


def test_an_error_on_a_pipe_does_not_end_the_session(nbdsh: Run) -> None:
    done = nbdsh(stdin="1 / 0\nh.get_size()\nprint('still here')\nexit(3)\nprint('gone')\n")
    assert (done.returncode, done.stdout) == (3, "still here\n")
    assert "ZeroDivisionError" in done.stderr
    assert "nbd.Error: nbd_get_size: " in done.stderr


def test_the_end_of_the_pipe_ends_a_block(nbdsh: Run) -> None:
    assert printed(nbdsh("-n", stdin="if True:\n    print('ran')")) == "ran\n"


def test_a_pipe_that_ends_inside_a_statement_is_an_error(nbdsh: Run) -> None:
    message = failure(nbdsh("-n", stdin="print('lost',\n"))
    assert message == "nbdsh: standard input ends inside a statement\n"


@pytest.mark.parametrize("options", [[], ["-n"], ["--opt-mode"]])
def test_an_empty_pipe_does_nothing(nbdsh: Run, options: list[str]) -> None:
    assert printed(nbdsh(*options)) == ""


def test_an_empty_command_is_a_command(nbdsh: Run) -> None:
    assert printed(nbdsh("-c", "", stdin="print('not read')")) == ""


def test_a_command_imports_nothing_that_only_a_session_needs(nbdsh: Run) -> None:
    slow = {"code", "readline", "rlcompleter", "importlib.metadata"}
    slow |= {"nbd.shell.console", "nbd.shell.tracebacks"}
    assert printed(nbdsh("-c", f"print(sorted({slow} & sys.modules.keys()))")) == "[]\n"


# ---- a current folder with files named like modules


ZERO = "ZeroDivisionError: division by zero"
SHELL_ALONE: dict[str, tuple[list[str], str, int, str]] = {
    "success": (["-c", "pass"], "", 0, ""),
    "a traceback": (["-c", "x = 1\nx / 0"], "", 1, ZERO),
    "a syntax error": (["-c", "x = = 1"], "", 1, "SyntaxError: invalid syntax"),
    "a misspelt keyword": (["-c", "fro x in (): pass"], "", 1, "SyntaxError: invalid syntax"),
    "a misspelt name": (["-c", "prnt('é')"], "", 1, "NameError: name 'prnt' is not defined"),
    "a misspelt attribute": (["-c", "'é'.lenght"], "", 1, "AttributeError: 'str' object has no"),
    "a misspelt import": (["-c", "from sys import pth"], "", 1, "ImportError: cannot import name"),
    "a missing module": (["-c", "import gone"], "", 1, "ModuleNotFoundError: No module named"),
    "a missing submodule": (["-c", "import nbd.gone"], "", 1, "ModuleNotFoundError: No module"),
    "wide letters": (["-c", "len('\u65e5\u672c') / 0"], "", 1, ZERO),
    "an interrupt": (["-c", "raise KeyboardInterrupt"], "", -2, "KeyboardInterrupt"),
    "an exit": (["-c", "exit('bye')"], "", 1, "bye"),
    "nbd.Error": (["-c", "raise nbd.Error('broken', 5)"], "", 1, f"{FAILED}broken"),
    "nbd.Error in full": (
        ["-c", "h.set_debug(False); raise nbd.Error('broken', 5)", "-v"],
        *("", 1, "nbd.Error: broken (EIO)"),
    ),
    "-u": (["-u", "nbd+unix:///?socket=/none"], "", 1, f"{FAILED}nbd_connect_uri: connect: "),
    "--version": (["--version"], "", 0, ""),
    "--help": (["--help"], "", 0, ""),
    "a wrong option": (["--nope"], "", 2, "nbdsh: error: unrecognized arguments: --nope"),
    "an address": (
        ["-c", "h.aio_connect(('bücher.invalid', '10809'))"],
        *("", 1, "TypeError: addr: the port must be int, not str"),
    ),
    "a host": (["-c", "h.aio_connect(('.ü', 1))"], "", 1, ""),
    "the parts that are loaded late": (["-c", "nbd.aio, nbd.memory, nbd.types"], "", 0, ""),
    "a large buffer": (["-c", "nbd.Buffer(1 << 20).is_zero()"], "", 0, ""),
    "an unraisable exception": (
        ["-c", "h.set_debug_callback(lambda *message: 1 / 0)", "-c", "h.set_debug(True)"],
        *("", 0, ZERO),
    ),
    "a thread at the end": (
        ["-c", "import _thread; _thread.start_new_thread(__import__('time').sleep, (600,))"],
        *("", 0, ""),
    ),
    "statements on a pipe": ([], "h.get_size()\nbytes(100)\n1 / 0\n", 0, ZERO),
    "help on a pipe": ([], "help(nbd.NBD.get_size)\nhelp('if')\nhelp('nbd.gone')\n", 0, ""),
    "half a statement on a pipe": ([], "(", 1, "nbdsh: standard input ends inside a statement"),
}


shell_alone = pytest.mark.parametrize(
    ("options", "stdin", "status", "last"), SHELL_ALONE.values(), ids=SHELL_ALONE
)


@shell_alone
def test_the_shell_imports_nothing_from_the_current_folder(
    nbdsh: Run, tmp_path: Path, options: list[str], stdin: str, status: int, last: str
) -> None:
    folder = shadows.make(tmp_path)
    done = nbdsh(*options, stdin=stdin, cwd=folder)
    assert (shadows.taken_from(folder), done.returncode) == ([], status)
    assert any(line.startswith(last) for line in [*done.stderr.splitlines(), ""]), done.stderr


@shell_alone
def test_the_shell_as_a_module_imports_nothing_from_the_current_folder(
    nbdsh: Run, tmp_path: Path, options: list[str], stdin: str, status: int, last: str
) -> None:
    folder = shadows.make(tmp_path)
    # With python -m and `import nbd` the folder is on the path, which we cannot change.
    before = "import runpy, sys, nbd; print(*{name.partition('.')[0] for name in sys.modules})"
    for name in printed(nbdsh(before, program=[sys.executable, "-c"])).split():
        (folder / f"{name}.py").unlink(missing_ok=True)
    done = nbdsh(*options, stdin=stdin, cwd=folder, program=MODULE)
    assert (shadows.taken_from(folder), done.returncode) == ([], status)
    assert any(line.startswith(last) for line in [*done.stderr.splitlines(), ""]), done.stderr


def test_the_package_imports_nothing_from_the_current_folder(
    nbdsh: Run, uri: str, tmp_path: Path
) -> None:
    folder = shadows.make(tmp_path)
    uses = (
        "with nbd.open(uri, 'r+b', reconnect=1) as disk: disk.write(b'x')",
        "nbd.copy(uri, None), nbd.copy(uri, '../copy')",
        "nbd.queue.Queue(nbd.connect(uri)), h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)",
        "h.connect_uri(uri), nbd.extents(h)",
    )
    options = [word for use in (f"uri = {uri!r}", *uses) for word in ("-c", use)]
    done = nbdsh(*options, cwd=folder)
    assert (shadows.taken_from(folder), done.returncode, done.stderr) == ([], 0, "")


@pytest.mark.parametrize("program", [SCRIPT, MODULE], ids=["script", "-m"])
def test_a_command_imports_from_the_current_folder_first(
    nbdsh: Run, tmp_path: Path, program: list[str]
) -> None:
    for name in ("code", "wave"):
        (tmp_path / f"{name}.py").write_text("value = 'mine'\n")
    command = "import code, wave; print(code.value, wave.value, sys.path[0] == '')"
    assert printed(nbdsh("-c", command, program=program)) == "mine mine True\n"


def test_a_module_of_a_command_imports_from_the_current_folder_first(
    nbdsh: Run, tmp_path: Path
) -> None:
    (tmp_path / "first.py").write_text("def second():\n    import wave\n    return wave.value\n")
    (tmp_path / "wave.py").write_text("value = 'mine'\n")
    assert printed(nbdsh("-c", "import first; print(first.second())")) == "mine\n"


def test_a_callback_imports_from_the_current_folder_first(nbdsh: Run, tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text("def debug(*message):\n    import wave, beside\n")
    for name in ("beside", "wave"):
        (tmp_path / f"{name}.py").write_text("print(__name__, __file__[-3:])\n")
    commands = ["-c", "import first; h.set_debug_callback(first.debug)", "-c", "h.set_debug(True)"]
    assert printed(nbdsh(*commands, "-c", "h.get_size")) == "wave .py\nbeside .py\n"


def test_a_thread_of_a_command_imports_from_the_current_folder_first(
    nbdsh: Run, tmp_path: Path
) -> None:
    (tmp_path / "wave.py").write_text("print('mine')\n")
    command = "import threading; t = threading.Thread(target=__import__, args=('wave',)); t.start()"
    assert printed(nbdsh("-c", command, "-c", "t.join()")) == "mine\n"


@pytest.mark.parametrize("option", ["-P", "-I"])
def test_no_command_imports_from_the_current_folder_if_python_has_the_option(
    nbdsh: Run, tmp_path: Path, option: str
) -> None:
    if option == "-P" and sys.version_info < (3, 11):
        pytest.skip("Python has the option -P since 3.11")
    (tmp_path / "beside.py").touch()
    done = nbdsh("-c", "import beside", program=[sys.executable, option, "-m", "nbd"])
    assert failure(done).endswith("\nModuleNotFoundError: No module named 'beside'\n")


def test_a_missing_module_is_reported_as_python_does(nbdsh: Run) -> None:
    message = failure(nbdsh("-c", "import nowhere_at_all"))
    assert message.endswith("\nModuleNotFoundError: No module named 'nowhere_at_all'\n")
    assert message.count("File ") == 1


def in_a_folder_that_was_removed(nbdsh: Run, gone: Path, program: list[str]) -> str:
    """Run a command in a folder that has been removed; return its output."""
    in_it = ["sh", "-c", 'rmdir "$0" && exec "$@"', str(gone), *program]
    done = nbdsh("-c", "print(h.get_debug())", program=in_it, cwd=gone)
    # Under the sanitizers python is a shell script, whose start would be measured.
    printed_besides = [s for s in done.stderr.splitlines() if not s.startswith("shell-init:")]
    assert (done.returncode, printed_besides) == (0, [])
    return done.stdout


def test_it_runs_in_a_folder_that_was_removed(nbdsh: Run, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    assert in_a_folder_that_was_removed(nbdsh, gone, SCRIPT) == "False\n"


@pytest.mark.skipif(
    sys.implementation.name == "pypy", reason="pypy -m needs a current folder, whatever it runs"
)
def test_it_runs_as_a_module_in_a_folder_that_was_removed(nbdsh: Run, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    assert in_a_folder_that_was_removed(nbdsh, gone, MODULE) == "False\n"
