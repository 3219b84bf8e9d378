"""Text as bytes, distributed by domains."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.data import Corpus, deal_domains, python_topics, read_corpus
from flexmoe_jax.errors import InputError


def corpus(*lengths: int) -> Corpus:
    """Domain f counts up from 100 f, so that the value of a byte gives its position."""
    texts = tuple((100 * f + np.arange(n) % 100).astype(np.uint8) for f, n in enumerate(lengths))
    return Corpus(tuple(f"d{f}" for f in range(len(lengths))), texts)


def test_runs_and_windows_worked_out_by_hand():
    # Of 50 bytes the last 5 are for tests; two clients have 22 each of both domains.
    dealt = deal_domains(corpus(50, 50), 2, 4, domains_per_client=2, seed=0)
    # Windows of 5 begin every 4 bytes, as long as they end within the run.
    starts = np.array([0, 4, 8, 12, 16, 22, 26, 30, 34, 38])
    assert dealt.train.shape == (20, 5)
    assert sorted(row[0] for row in dealt.train) == [*starts, *(100 + starts)]
    assert all((np.diff(row.astype(int)) == 1).all() for row in dealt.train)
    assert dealt.counts().tolist() == [[5, 5], [5, 5]]
    assert dealt.owns.all()
    assert [row[0] for row in dealt.test] == [45, 145]
    # The last 9 bytes of 90 are two windows.
    dealt = deal_domains(corpus(90, 50), 2, 4, domains_per_client=2, seed=0)
    assert [row[0] for row in dealt.test] == [81, 85, 145]
    assert dealt.domain.tolist() == [0, 0, 1]


def test_a_client_has_of_each_of_its_domains_what_the_domain_has_for_it():
    # 180 and 90 bytes: 162 and 81 to train on, of which each of three clients has 54 and 27.
    dealt = deal_domains(corpus(180, 90), 3, 4, domains_per_client=2, seed=1)
    assert dealt.counts().tolist() == [[13, 6]] * 3
    # The same of each, where clients are to have 40 bytes in all.
    even = deal_domains(corpus(180, 90), 3, 4, domains_per_client=2, bytes_per_client=40, seed=1)
    assert even.counts().tolist() == [[4, 4]] * 3


def test_limits_keep_every_domain_of_a_client():
    dealt = deal_domains(corpus(400, 400), 2, 4, domains_per_client=2, seed=0)
    few = dealt.limited(8, 6)
    assert few.counts().tolist() == [[2, 2], [2, 2]]
    assert [len(part) for part in few.parts] == [4, 4]
    assert np.bincount(few.domain).tolist() == [3, 3]
    for kept, of in ((few.train, dealt.train), (few.test, dealt.test)):
        assert {tuple(row) for row in kept} <= {tuple(row) for row in of}
    whole = dealt.limited(0, 0)
    assert whole.train is dealt.train
    assert whole.test is dealt.test


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_domains_are_held_evenly_and_runs_are_disjoint(domains, clients, each, length, seed):
    each = min(each, domains)
    if clients * each < domains:
        return
    rng = np.random.default_rng(seed)
    texts = tuple(rng.permutation(np.arange(256, dtype=np.uint8)).repeat(1) for _ in range(domains))
    names = tuple(f"d{f}" for f in range(domains))
    dealt = deal_domains(Corpus(names, texts), clients, length, domains_per_client=each, seed=seed)
    held = dealt.owns.sum(axis=0)
    assert (dealt.owns.sum(axis=1) == each).all()
    assert held.max() - held.min() <= 1
    assert sorted(np.concatenate(dealt.parts).tolist()) == list(range(len(dealt.train)))
    assert (dealt.counts() > 0).tolist() == dealt.owns.tolist()
    # Every byte of a domain is another one here: what is to be told is told once, by one client,
    # and none of it is in the test text.
    told: set[tuple[int, int]] = set()
    for row, f in zip(dealt.train, dealt.train_domain, strict=True):
        cells = {(int(f), int(byte)) for byte in row[1:]}
        assert not cells & told
        told |= cells
    for row, f in zip(dealt.test, dealt.domain, strict=True):
        assert not {(int(f), int(byte)) for byte in row} & told


def test_folders_and_lines_of_clients(tmp_path):
    (tmp_path / "b.txt").write_bytes("é\n".encode())
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "c.md").write_text("no text file")
    read = read_corpus(tmp_path)
    assert read.names == ("a", "b")
    assert [bytes(text) for text in read.texts] == [b"one", "é\n".encode()]
    lines = [{"client": 2, "text": "x"}, {"client": "1", "text": "y"}, {"client": 2, "text": "z"}]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    read = read_corpus(file)
    assert read.names == ("1", "2")
    assert [bytes(text) for text in read.texts] == [b"y\n", b"x\nz\n"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_newlines_end_a_line(tmp_path, end):
    texts = ["one\u2028two", "three\u2029four\x85"]
    lines = [json.dumps({"client": "a", "text": text}, ensure_ascii=False) for text in texts]
    file = tmp_path / "chat.jsonl"
    file.write_bytes("".join(line + end for line in lines).encode())
    assert bytes(read_corpus(file).texts[0]).decode() == "".join(text + "\n" for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("", b"", "there is no such folder or file"),
        ("x.txt", b"a text", "there is no such folder or file: name a folder"),
        ("x.jsonl", b'{"client": 1}', "line 1 is no object with text and client"),
        ("x.jsonl", b'\n{"client": 1, "text": 3}', "line 2 is no object"),
        ("x.jsonl", b"[]", "line 1 is no object"),
        ("x.jsonl", rb'{"client": 1, "text": "\ud800"}', "line 1 is no object .* valid Unicode"),
        ("x.jsonl", rb'{"client": "\ud800", "text": "a"}', "line 1 is no object"),
        ("x.jsonl", b"[" * 100_000, "line 1 is no object"),
        ("x.jsonl", b"\xff", "is not UTF-8 text"),
        ("x.jsonl", b"", "there is no text in it"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, line):
    place = tmp_path / (name or "missing")
    if name:
        place.write_bytes(content)
    with pytest.raises(InputError, match=rf"^data.dir=.*{line}"):
        read_corpus(place)


def test_folders_without_text_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no \*\.txt file"):
        read_corpus(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xe9")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"domains_per_client": 3},
            "partition.domains_per_client=3: give 1 to 2, the number of domains",
        ),
        (
            {"clients": 1, "domains_per_client": 1},
            "partition.domains_per_client=1: 1 clients leave some",
        ),
        ({"clients": 20}, "data.length=4: d0 has 81 bytes for 20 clients, not 5 for each"),
        ({"bytes_per_client": 90}, "partition.bytes_per_client=90: d0 has 81 bytes for 2 clients"),
        ({"bytes_per_client": 8}, "partition.bytes_per_client=8: d0 has .* give each 5 to 40"),
        ({"bytes_per_client": 1}, "partition.bytes_per_client=1: d0 has .* give each 5 to 40"),
    ],
)
def test_what_cannot_be_dealt_is_refused(options, line):
    given_ = {"clients": 2, "length": 4, "domains_per_client": 2, "seed": 0} | options
    with pytest.raises(InputError, match=f"^{line}"):
        deal_domains(corpus(90, 90), **given_)


def test_texts_that_are_too_short_to_be_tested_on_are_refused():
    with pytest.raises(InputError, match=r"^data.length=4: .* test texts has 4 bytes: choose"):
        deal_domains(corpus(40, 40), 2, 4, domains_per_client=2, seed=0)


def test_pythons_own_topics_need_no_file():
    topics = python_topics()
    assert len(topics.names) >= 20
    assert all(len(text) >= 2000 for text in topics.texts)
