"""nbd.connect requests base:allocation, and waits for a server that is not listening yet."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import servers
from support.servers import StartServer

import nbd
from nbd._binding import handle
from nbd._disks import connect as connecting


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list of the pauses between tries, and skip these pauses."""
    made: list[float] = []
    monkeypatch.setattr(connecting, "_rest", made.append)
    return made


def test_base_allocation_is_asked_for(nbdkit: StartServer) -> None:
    with nbd.connect(nbdkit("memory", "1M").uri) as h:
        assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)


def test_other_contexts_can_be_asked_for(nbdkit: StartServer) -> None:
    with nbd.connect(nbdkit("memory", "1M").uri, contexts=[]) as h:
        assert not h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)


def test_a_command_is_started() -> None:
    with nbd.connect([servers.program("nbdkit"), "-s", "memory", "1M"]) as h:
        assert h.get_size() == 1 << 20


def test_the_timeout_stays(nbdkit: StartServer) -> None:
    with nbd.connect(nbdkit("memory", "1M").uri, timeout=5) as h:
        assert h.gettimeout() == 5


def test_a_handle_is_prepared_before_it_is_connected(nbdkit: StartServer) -> None:
    uri = nbdkit("memory", "1M").uri
    with nbd.connect(uri, prepare=lambda h: h.set_handle_name("prepared")) as h:
        assert h.get_handle_name() == "prepared"


def test_a_server_that_hangs_is_a_timeout(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    server.pause()
    with pytest.raises(nbd.Timeout):
        nbd.connect(server.uri, timeout=0.05)
    server.resume()


def test_a_missing_server_is_tried_once(tmp_sock: str, pauses: list[float]) -> None:
    with pytest.raises(nbd.Error) as missing:
        nbd.connect(f"nbd+unix:///?socket={tmp_sock}")
    assert (missing.value.errno, pauses) == ("ENOENT", [])


def test_a_server_that_starts_late_is_waited_for(
    tmp_sock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(seconds: float) -> None:
        if not started:
            listener = servers.listening_unix(Path(tmp_sock))
            argv = servers.nbdkit_argv(["memory", "1M"], None, None, None)
            activate = ["/bin/sh", "-c", servers.ACTIVATE, "sh", *argv]
            with listener:
                started.append(subprocess.Popen(activate, stdin=listener.fileno()))

    monkeypatch.setattr(connecting, "_rest", start)
    try:
        with nbd.connect(f"nbd+unix:///?socket={tmp_sock}", retry_for=20) as h:
            assert h.get_size() == 1 << 20
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_the_pauses_grow_up_to_a_quarter_of_a_second(
    tmp_sock: str, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    clock = iter([0.0, *(0.1 for _ in range(14)), 10.0, 10.0])
    monkeypatch.setattr(connecting, "monotonic", lambda: next(clock))
    with pytest.raises(nbd.Error) as missing:
        nbd.connect(f"nbd+unix:///?socket={tmp_sock}", retry_for=5)
    assert missing.value.errno == "ENOENT"
    assert pauses == [0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.25]


def test_a_port_that_refuses_is_tried_again(pauses: list[float]) -> None:
    listener = servers.listening_tcp("127.0.0.1")
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(nbd.Error) as refused:
        nbd.connect(f"nbd://127.0.0.1:{port}", retry_for=0.05)
    assert refused.value.errno == "ECONNREFUSED"
    assert pauses


def test_another_error_is_not_tried_again(pauses: list[float]) -> None:
    with pytest.raises(nbd.Error):
        nbd.connect("nbd+nothing://", retry_for=20)
    assert pauses == []


def test_a_failure_leaves_no_handle_open(tmp_sock: str) -> None:
    before = len(handle._open)
    with pytest.raises(nbd.Error):
        nbd.connect(f"nbd+unix:///?socket={tmp_sock}")
    assert len(handle._open) == before


def test_seconds_are_more_than_0(tmp_sock: str) -> None:
    uri = f"nbd+unix:///?socket={tmp_sock}"
    with pytest.raises(ValueError, match="retry_for: 0 is not more than 0"):
        nbd.connect(uri, retry_for=0)
    with pytest.raises(ValueError, match="seconds: 0 is not more than 0"):
        nbd.connect(uri, timeout=0)


def test_contexts_are_a_list() -> None:
    with pytest.raises(TypeError, match="contexts: a list of str is needed, not str"):
        nbd.connect("nbd://localhost", contexts="base:allocation")
