"""Text as bytes: domains are read from files, and clients get disjoint runs of them.

A token is a byte, so no tokenizer has to be trained or downloaded. An example is a window of S + 1
bytes. The model predicts each of the last S bytes from the bytes before it.

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
"""Values of `data.name` that are not TFDS names: the user's own texts, and Python's help texts."""

# Shorter topics, in bytes, are not used as domains.
_SHORTEST = 2_000
# Share at the end of every domain that is used for testing only.
_TEST_SHARE = 0.1


class Corpus(NamedTuple):
    """Texts by domain.

    Attributes:
      names: names of the F domains: languages, authors, clients.
      texts: (bytes,) uint8 of each domain.
      tests: (bytes,) uint8, a separate test text of each domain. Empty if the last tenth of each of
        `texts` is the test text.
    """

    names: tuple[str, ...]
    texts: tuple[np.ndarray, ...]
    tests: tuple[np.ndarray, ...] = ()

    def apart(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Return the training text and the test text of each domain."""
        if self.tests:
            return self.texts, self.tests
        ends = [len(text) - round(_TEST_SHARE * len(text)) for text in self.texts]
        cut = list(zip(self.texts, ends, strict=True))
        return tuple(text[:end] for text, end in cut), tuple(text[end:] for text, end in cut)

    def windows(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut all texts into training (M, length + 1) and test (M', length + 1) uint8 examples.

        Raises:
          InputError: if the texts are too short for a single training example.
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
    """Text that is divided among clients.

    Attributes:
      train: (M, S + 1) uint8 training examples.
      parts: for each of the C clients, the positions of its examples in `train`, increasing.
      train_domain: (M,) int32, the domain of each training example.
      test: (M', S + 1) uint8 test examples.
      domain: (M',) int32, the domain of each test example.
      owns: (C, F) bool, the domains of each client.
    """

    train: np.ndarray
    parts: tuple[np.ndarray, ...]
    train_domain: np.ndarray
    test: np.ndarray
    domain: np.ndarray
    owns: np.ndarray

    def counts(self) -> np.ndarray:
        """Count each client's training examples in each domain, (C, F) int64."""
        domains = self.owns.shape[1]
        return np.stack(
            [np.bincount(self.train_domain[part], minlength=domains) for part in self.parts]
        )

    def limited(self, train: int, test: int) -> Dealt:
        """Keep evenly spaced examples: of each client, and of the test set.

        Args:
          train: limit for the training examples of all clients together, divided equally among the
            clients; each keeps at least one. 0 keeps all.
          test: limit for the test examples; 0 keeps all.
        """
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
    """Return `kept` of `count` positions, spaced as evenly as possible; all if there are fewer."""
    kept = min(kept, count)
    return (2 * np.arange(kept) + 1) * count // (2 * kept)


def read_corpus(path: str | os.PathLike[str]) -> Corpus:
    """Read a folder of UTF-8 `*.txt` files, one for each domain, or a `.jsonl` file.

    Each line of a `.jsonl` file is an object with `text` and `client`. The lines of a client are
    joined, in order, to the text of one domain.

    Raises:
      InputError: if there is no such folder or file, it holds no text, or it is not UTF-8.
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
    """Return the English help texts of the Python installation; each long topic is a domain."""
    from pydoc_data.topics import topics

    texts = {name: text.encode() for name, text in topics.items() if len(text) >= _SHORTEST}
    return corpus_of(texts, {}, Path("pydoc_data"))


def corpus_of(texts: Mapping[str, bytes], tests: Mapping[str, bytes], place: Path) -> Corpus:
    """Make a corpus of texts by domain name, without blank texts.

    Args:
      texts: domain name -> text.
      tests: domain name -> test text; empty if the last tenth of each of `texts` is the test text.
      place: source of the texts, for messages.

    Raises:
      InputError: if there is no text, or a domain has a test text but no training text.
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
    texts: dict[bytes, list[bytes]] = {}
    # Not `splitlines`: JSON strings may hold other line breaks as they are, such as U+2028.
    for number, line in enumerate(_utf8(file, file.read_bytes()).decode().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            # JSON can escape half a character ("\ud800"), which `encode` refuses.
            client, text = str(entry["client"]).encode(), (entry["text"] + "\n").encode()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            remedy = f"line {number} is no object with text and client, both valid Unicode"
            raise InputError("data.dir", file, remedy) from error
        texts.setdefault(client, []).append(text)
    return {client.decode(): b"".join(parts) for client, parts in texts.items()}


def deal_domains(
    corpus: Corpus,
    clients: int,
    length: int,
    *,
    domains_per_client: int,
    bytes_per_client: int = 0,
    seed: int,
) -> Dealt:
    """Assign domains to every client, and give it a separate run of bytes from each.

    Each domain has equally many clients (±1), and the runs of a domain are disjoint. The last tenth
    of every domain is its test text, unless the corpus has separate test texts. A client's own test
    text is the test text of its domains.

    Args:
      corpus: the texts.
      clients: C.
      length: S.
      domains_per_client: number of domains of each client.
      bytes_per_client: bytes of each client in total, the same from each of its domains; 0 divides
        every domain completely among its clients.
      seed: seed of the draws.

    Raises:
      InputError: if a client is to have more domains than there are, a domain has no client, or a
        domain is too short for its clients.
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
    """Check the number of domains of each client.

    Raises:
      InputError: if it is out of range, or leaves a domain without clients; names the field.
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
    """Return the distance between the starts of a domain's runs, and their length, in bytes.

    Raises:
      InputError: if the runs would be too short, or need more bytes than the domain has.
    """
    stride = size // holders
    run = bytes_per_client // domains_per_client if bytes_per_client else stride
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
    """Draw (C, F) bool: `per_client` domains a client, and equally many clients (±1) a domain."""
    left = fill(np.full(domains, clients), clients * per_client, rng).astype(np.float64)
    owns = np.zeros((clients, domains), bool)
    for client in rng.permutation(clients):
        # Domains that still need most clients come first (Gale–Ryser); ties are random.
        taken = np.argsort(-(left + rng.random(domains)))[:per_client]
        left[taken] -= 1
        owns[client, taken] = True
    return owns


def _windows(text: np.ndarray, length: int) -> np.ndarray:
    """Cut (M, S + 1) windows of a text; each begins with the last byte of the previous one."""
    count = max(0, (len(text) - 1) // length)
    starts = np.arange(count)[:, None] * length
    return text[starts + np.arange(length + 1)] if count else np.zeros((0, length + 1), np.uint8)
