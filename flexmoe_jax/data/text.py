"""Text as bytes: domains from files, dealt out to clients in disjoint runs.

A token is a byte, so nothing has to be learnt or downloaded to read a text. An example is a window
of S + 1 bytes, of which the last S are to be told, each from those before it.

Axis legend: `C` clients, `M` examples, `S` tokens of an example, `F` domains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexmoe_jax.data.apportion import fill
from flexmoe_jax.errors import InputError

TEXT, TOPICS = "text", "python_topics"
"""Names beside TFDS's that `data.name` takes: texts of one's own, and Python's own help texts."""

# Bytes of a topic that is worth being a domain.
_SHORTEST = 2_000
# The end of every domain that is not trained on.
_TEST_SHARE = 0.1


class Corpus(NamedTuple):
    """Texts by what they are of.

    Attributes:
      names: of the F domains: languages, authors, clients.
      texts: (bytes,) uint8 of each.
      tests: the same of their test texts, where these are texts of their own; empty where they are
        the last tenths of `texts`.
    """

    names: tuple[str, ...]
    texts: tuple[np.ndarray, ...]
    tests: tuple[np.ndarray, ...] = ()

    def apart(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """What is trained on and what is tested on, of each domain."""
        if self.tests:
            return self.texts, self.tests
        ends = [len(text) - round(_TEST_SHARE * len(text)) for text in self.texts]
        cut = list(zip(self.texts, ends, strict=True))
        return tuple(text[:end] for text, end in cut), tuple(text[end:] for text, end in cut)

    def windows(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(M, length + 1) and (M', length + 1) uint8 examples of it all: to train on, to test on.

        Raises:
          InputError: the texts are too short for a single example to train on.
        """
        train, test = (
            np.concatenate([_windows(text, length) for text in part]) for part in self.apart()
        )
        if not len(train):
            longest = max(map(len, self.texts))
            remedy = f"the longest text has {longest} bytes: choose a smaller one"
            raise InputError("data.length", length, remedy)
        return train, test


class Dealt(NamedTuple):
    """Text that has been dealt out.

    Attributes:
      train: (M, S + 1) uint8 examples to train on.
      parts: for each of the C clients its examples among them, increasing.
      train_domain: (M,) int32, the domain of each of the examples to train on.
      test: (M', S + 1) uint8 examples to test on.
      domain: (M',) int32, the domain of each of these.
      owns: (C, F) bool, the domains of each client.
    """

    train: np.ndarray
    parts: tuple[np.ndarray, ...]
    train_domain: np.ndarray
    test: np.ndarray
    domain: np.ndarray
    owns: np.ndarray

    def counts(self) -> np.ndarray:
        """(C, F) int64, training examples of each client by domain."""
        domains = self.owns.shape[1]
        return np.stack(
            [np.bincount(self.train_domain[part], minlength=domains) for part in self.parts]
        )

    def limited(self, train: int, test: int) -> Dealt:
        """Evenly spaced examples of each client, and of all test examples; 0 for all of them."""
        kept = self
        if train and train < len(self.train):
            share = max(1, train // len(self.parts))
            parts = [part[_spread(len(part), share)] for part in self.parts]
            rows, ends = np.concatenate(parts), np.cumsum([0, *map(len, parts)])
            kept = kept._replace(
                train=self.train[rows],
                parts=tuple(np.arange(a, b) for a, b in pairwise(ends)),
                train_domain=self.train_domain[rows],
            )
        if test and test < len(self.test):
            rows = _spread(len(self.test), test)
            kept = kept._replace(test=self.test[rows], domain=self.domain[rows])
        return kept


def _spread(count: int, kept: int) -> np.ndarray:
    """So many of `count` places, or all of them if they are fewer, as even as can be."""
    kept = min(kept, count)
    return (2 * np.arange(kept) + 1) * count // (2 * kept)


def read_corpus(path: str | os.PathLike[str]) -> Corpus:
    """Reads a folder of UTF-8 `*.txt` files, one a domain, or a `.jsonl` file.

    Each line of a `.jsonl` file is an object with `text` and `client`; a client's lines follow one
    another in its text.

    Raises:
      InputError: no such folder or file, no text in it, or what is no UTF-8.
    """
    remedy = "name a folder of *.txt files, one a domain, or a .jsonl file with text and client"
    if not os.fspath(path):
        raise InputError("data.dir", path, remedy)
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        files = sorted(file for file in place.glob("*.txt") if file.is_file())
        if not files:
            raise InputError("data.dir", place, "the folder holds no *.txt file: one a domain")
        return corpus_of({file.stem: _utf8(file, file.read_bytes()) for file in files}, {}, place)
    if place.suffix == ".jsonl" and place.is_file():
        return corpus_of(_by_client(place), {}, place)
    raise InputError("data.dir", place, f"there is no such folder or file: {remedy}")


def python_topics() -> Corpus:
    """The help texts of the Python installation, in English, a topic a domain; no short ones."""
    from pydoc_data.topics import topics

    texts = {name: text.encode() for name, text in topics.items() if len(text) >= _SHORTEST}
    return corpus_of(texts, {}, Path("pydoc_data"))


def corpus_of(texts: Mapping[str, bytes], tests: Mapping[str, bytes], place: Path) -> Corpus:
    """Texts by their domains' names, without those that are blank.

    Args:
      texts: of the domains.
      tests: their test texts; none where these are to be the last tenths of `texts`.
      place: where they are from, for messages.

    Raises:
      InputError: there is no text, or a test text of a domain without one to train on.
    """
    kept = {name: text for name, text in sorted(texts.items()) if text.strip()}
    if not kept:
        raise InputError("data.dir", place, "there is no text in it")
    strange = sorted(tests.keys() - kept.keys())
    if strange:
        found = f"{place} has test texts of {strange[0]}, and none of it to train on"
        raise InputError("data.domain", strange[0], f"{found}: choose another feature")
    ends = [tests.get(name, b"") for name in kept] if tests else []
    return Corpus(tuple(kept), *(_bytes(of) for of in (kept.values(), ends)))


def _bytes(texts: Iterable[bytes]) -> tuple[np.ndarray, ...]:
    return tuple(np.frombuffer(text, np.uint8) for text in texts)


def _utf8(file: Path, content: bytes) -> bytes:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise InputError("data.dir", file, f"is not UTF-8 text ({error.reason})") from error
    return content


def _by_client(file: Path) -> dict[str, bytes]:
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(_utf8(file, file.read_bytes()).decode().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            texts.setdefault(str(entry["client"]), []).append(entry["text"] + "\n")
        except (ValueError, TypeError, KeyError) as error:
            remedy = f"line {number} is no object with text and client"
            raise InputError("data.dir", file, remedy) from error
    return {client: "".join(parts).encode() for client, parts in texts.items()}


def deal_domains(
    corpus: Corpus,
    clients: int,
    length: int,
    *,
    domains_per_client: int,
    bytes_per_client: int = 0,
    seed: int,
) -> Dealt:
    """Gives every client some domains, and of each a run of its own.

    Domains are held by equally many clients (±1), and a domain's runs are disjoint. The last tenth
    of every domain is its test text, unless it has one of its own; a client's own test text is that
    of its domains.

    Args:
      corpus: the texts.
      clients: C.
      length: S.
      domains_per_client: how many domains each client has.
      bytes_per_client: what each client has in all, the same of each of its domains; 0 to divide
        every domain among its clients.
      seed: of who gets what.

    Raises:
      InputError: more domains a client than there are, domains that nobody gets, or a domain that
        is too short for its clients.
    """
    count = len(corpus.names)
    check_domains(count, clients, domains_per_client)
    rng = np.random.default_rng([seed, 0])
    owns = _draw_owners(count, clients, domains_per_client, rng)
    windows: list[np.ndarray] = []
    owner: list[np.ndarray] = []
    of: list[np.ndarray] = []
    texts, ends = corpus.apart()
    for f, train in enumerate(texts):
        holders = rng.permutation(np.flatnonzero(owns[:, f]))
        stride, size = _run_of(
            corpus.names[f], len(train), len(holders), length, bytes_per_client, domains_per_client
        )
        for place, holder in enumerate(holders):
            cut = _windows(train[place * stride : place * stride + size], length)
            windows.append(cut)
            owner.append(np.full(len(cut), holder))
            of.append(np.full(len(cut), f, np.int32))
    test = [_windows(end, length) for end in ends]
    if not any(map(len, test)):
        longest = f"the longest of the domains' test texts has {max(map(len, ends))} bytes"
        raise InputError("data.length", length, f"{longest}: choose a smaller one")
    everyone = np.concatenate(owner)
    return Dealt(
        train=np.concatenate(windows),
        parts=tuple(np.flatnonzero(everyone == c) for c in range(clients)),
        train_domain=np.concatenate(of),
        test=np.concatenate(test),
        domain=np.repeat(np.arange(count), [len(rows) for rows in test]).astype(np.int32),
        owns=owns,
    )


def check_domains(domains: int, clients: int, per_client: int) -> None:
    """Refuses a number of domains a client that cannot be.

    Raises:
      InputError: naming the field.
    """
    field = "partition.domains_per_client"
    if not 1 <= per_client <= domains:
        raise InputError(field, per_client, f"give 1 to {domains}, the number of domains")
    if clients * per_client < domains:
        least = -(-domains // clients)
        remedy = f"{clients} clients leave some of the {domains} domains to nobody; give {least}"
        raise InputError(field, per_client, f"{remedy} or more, or more clients")


def _run_of(
    name: str, size: int, holders: int, length: int, bytes_per_client: int, domains_per_client: int
) -> tuple[int, int]:
    """How far apart the runs of a domain begin, and how long they are, in bytes.

    Raises:
      InputError: they would be too short, or more than there is.
    """
    stride = size // holders
    run = bytes_per_client // domains_per_client or stride
    if stride <= length:
        found = f"{name} has {size} bytes for {holders} clients, not {length + 1} for each"
        raise InputError("data.length", length, f"{found}: choose a smaller one, or fewer clients")
    if run > stride or run <= length:
        remedy = f"give each {length + 1} to {stride} of it, or have fewer clients"
        found = f"{name} has {size} bytes for {holders} clients: {remedy}"
        raise InputError("partition.bytes_per_client", bytes_per_client, found)
    return stride, run


def _draw_owners(
    domains: int, clients: int, per_client: int, rng: np.random.Generator
) -> np.ndarray:
    """(C, F) bool: each client has `per_client` domains, each domain equally many clients (±1)."""
    left = fill(np.full(domains, clients), clients * per_client, rng).astype(np.float64)
    owns = np.zeros((clients, domains), bool)
    for client in rng.permutation(clients):
        # Those with most clients still to find come first (Gale–Ryser), ties at random.
        taken = np.argsort(-(left + rng.random(domains)))[:per_client]
        left[taken] -= 1
        owns[client, taken] = True
    return owns


def _windows(text: np.ndarray, length: int) -> np.ndarray:
    """(M, S + 1) windows of a text, each beginning with the last byte of the one before."""
    count = max(0, (len(text) - 1) // length)
    starts = np.arange(count)[:, None] * length
    return text[starts + np.arange(length + 1)] if count else np.zeros((0, length + 1), np.uint8)
