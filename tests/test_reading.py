from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax import reading
from flexmoe_jax.errors import InputError, printable
from flexmoe_jax.reading import UnreadableError, parse_json, read_bytes, read_json, read_text


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a socket": listen,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_would_be_waited_for_or_never_ends_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # A socket's name must be short.
    NO_FILES[kind](Path("odd"))
    with pytest.raises(UnreadableError, match=rf"^is {kind}, not a file$"):
        read_bytes("odd", 10)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(UnreadableError, match="larger than the 4 bytes"):
        read_bytes(path, 4)
    with path.open("r+b") as file:
        file.truncate(2**40)  # Takes no space on the disk.
    with pytest.raises(UnreadableError, match="larger than"):
        read_bytes(path, 2**30)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none", 5)
    with pytest.raises(UnreadableError):
        read_bytes("a\0b", 5)


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf" + '{"é": 1}'.encode())
    assert read_text(path, 100) == '{"é": 1}'
    assert read_json(path) == {"é": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no JSON"),
        (b'{"a": 1', "is no JSON"),
        (b'{"a": "\xff"}', "is no UTF-8 text: byte 7"),
        (b"[" * 100_000 + b"]" * 100_000, "nested more than 32 deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than 32 deep"),
        (b'{"a": ' + b"9" * 400 + b"}", "whole number of 400 digits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "whole number of 5000 digits"),
        ('{"a": 1}'.encode("utf-16"), "is no UTF-8 text"),
    ],
)
def test_json_beyond_the_limits_is_one_error(content, reason):
    with pytest.raises(UnreadableError, match=reason) as caught:
        parse_json(content)
    assert len(str(caught.value)) <= 300


def test_json_within_the_limits_is_what_json_says():
    deep: object = 1
    for _ in range(31):
        deep = [deep]
    for value in (deep, {"a": [1, -(2**62), 1.5, None, True, "ü"]}, [[]] * 100):
        assert parse_json(json.dumps(value).encode()) == value
    assert math.isnan(parse_json(b"NaN"))
    assert parse_json(b"[-Infinity, 1e400]") == [-math.inf, math.inf]


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'"a"'])
def test_another_value_is_no_object(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UnreadableError, match="holds no JSON object"):
        read_json(tmp_path / "file")


@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:0123456789eE-.\\u', max_size=60))
def test_any_bytes_are_json_or_one_error(content):
    with suppress(UnreadableError):
        parse_json(content if isinstance(content, bytes) else content.encode())


@given(st.text())
def test_a_reason_is_one_line(reason):
    assert len(str(UnreadableError(reason)).splitlines()) <= 1


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    reading.require_memory(1000)
    with pytest.raises(UnreadableError, match=r"takes 1,000,000.0 GB of memory"):
        reading.require_memory(10**15)


def test_a_container_has_its_limit_less_what_it_uses(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_CONTAINER", tmp_path)
    (tmp_path / "memory.current").write_text("9000\n")
    (tmp_path / "memory.stat").write_text("anon 6000\nactive_file 1000\ninactive_file 2000\n")
    (tmp_path / "memory.max").write_text("10000\n")
    reading.require_memory(4000)  # 1000 are not used, and 3000 hold a cache of files
    with pytest.raises(UnreadableError, match="takes"):
        reading.require_memory(4001)
    (tmp_path / "memory.max").write_text("max\n")
    reading.require_memory(4001)


@given(st.text())
def test_what_is_printed_is_one_line_without_commands(text):
    line = printable(text)
    assert len(line.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line)
    line.encode()
    assert line == text or not text.isprintable() or len(text) > 1000


def test_hidden_characters_are_shown():
    assert printable("a\x1b[31mb\n\tc\u202e\ud800") == r"a\x1b[31mb  c\u202e\ud800"
    assert printable("20\N{NO-BREAK SPACE}s · 日本") == "20\N{NO-BREAK SPACE}s · 日本"
    assert printable("x" * 50, most=10) == "x" * 9 + "…"
    line = str(InputError("data.name", "a\nb\x1b]0;x\x07", "it holds\nc\x1b"))
    assert line == r"data.name=a b\x1b]0;x\x07: it holds c\x1b"
