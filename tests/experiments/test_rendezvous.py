"""Processes of one run find each other before they load JAX; here they are threads."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.program import Program
from experiments.rendezvous import rendezvous
from flexmoe_jax.errors import InputError

CONFIG = {
    "seed": 0,
    "model.widths": (8, 8),
    "server.clip": float("nan"),
    "data.dir": "/here",
    "data.name": "/here/mine.npz",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def meet(*processes: Program, **changes: object) -> list[str]:
    """Returns the error of each process, empty for none; the last process has changed fields."""

    def one(program: Program) -> str:
        try:
            config = CONFIG | (changes if program is processes[-1] else {})
            rendezvous(program, config, lambda line: None)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def several(size: int, seconds: int = 20, port: int | None = None) -> list[Program]:
    at = f"localhost:{port or free_port()}"
    return [Program(at, size, number, None, seconds) for number in range(size)]


def test_all_begin_together_wherever_their_data_lie():
    changed = {"data.dir": "/elsewhere", "data.name": "/elsewhere/mine.npz"}
    # One after the other at one address, which calls that linger do not block.
    port = free_port()
    for _ in range(3):
        assert meet(*reversed(several(4, port=port)), **changed) == [""] * 4


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "seed=0: process 2 has 1; give all processes of a run the same"),
        ({"model.widths": (8,)}, "model.widths=[8, 8]: process 2 has [8]"),
        ({"newer": 3}, "newer=None: process 2 has 3"),
    ],
)
def test_what_differs_is_refused_by_all_in_the_same_line(changes, line):
    lines = meet(*several(3), **changes)
    assert lines[0].startswith(line)
    assert lines == [lines[0]] * 3


def test_who_does_not_come_is_named_by_all():
    programs = several(4, seconds=1)
    lines = meet(programs[0], programs[2])
    line = (
        f"--coordinator={programs[0].coordinator}: 2 of 4 processes did not come within 1 s: 1, 3"
    )
    assert [said.split(";")[0] for said in lines] == [line] * 2
    # A name of its own that leads a machine to itself alone is said.
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        name = f"{socket.gethostname()}:{other.getsockname()[1]}"
    if socket.gethostbyname(socket.gethostname()).startswith("127."):
        [line] = meet(programs[0]._replace(coordinator=name))
        assert "which only this machine reaches): 1, 2, 3" in line
    [alone] = meet(programs[1])
    assert "no process 0 within 1 s (Connection refused)" in alone


def test_strangers_change_nothing():
    programs = several(3)
    host, port = programs[0].address()
    with ThreadPoolExecutor(6) as pool:
        zero = pool.submit(meet, programs[0])
        time.sleep(0.3)
        # One that says nothing, one that ends at once, and some that talk of other things.
        silent = socket.create_connection((host, port))
        said = (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"[1]\n", b"{" * 10**5 + b"\n")
        for words in said:
            with socket.create_connection((host, port)) as call:
                call.sendall(words)
        # Processes of another program, and one that died while it waited.
        [line] = meet(programs[1]._replace(size=2))
        assert line == "--process_id=1: process 0 has --process_count=3, not 2"
        with socket.create_connection((host, port)) as call:
            call.sendall(b'{"process": 1, "count": 3, "same": {}}\n'[:-1])
        one = pool.submit(meet, programs[1])
        time.sleep(0.3)
        [line] = meet(programs[1])
        assert line == "--process_id=1: another process has this number"
        two = pool.submit(meet, programs[2])
        assert [zero.result(), one.result(), two.result()] == [[""]] * 3
        silent.close()


def test_an_address_that_is_taken_or_not_ours_is_one_line():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        for host in (f"localhost:{taken.getsockname()[1]}", "no.such.host.invalid:1234"):
            [line] = meet(Program(host, 2, 0))
            assert line.startswith(f"--coordinator={host}: process 0 cannot listen there (")
        [line] = meet(Program(f"localhost:{taken.getsockname()[1]}", 2, 1, None, 1))
        assert "no process 0 within 1 s" in line
