"""Texts in TFDS's format: which features are read, and what their domains are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexmoe_jax.data import Corpus, DataOptions, deal_domains, load_corpus
from flexmoe_jax.errors import InputError
from tests.data.conftest import write_texts

Columns = Callable[[Any], dict[str, Any]]

NEWS = [
    {"title": "a", "description": "one two", "label": 0},
    {"title": "b", "description": "drei", "label": 1},
    {"title": "a", "description": "four", "label": 0},
    {"title": "b", "description": "of nobody", "label": -1},
]


def news(tfds: Any) -> dict[str, Any]:
    text, label = tfds.features.Text(), tfds.features.ClassLabel(names=["World", "Sports"])
    return {"title": text, "description": text, "label": label}


def write_news(folder: Path, **splits: Any) -> Path:
    return write_texts(folder, "news", splits, news, ("description", "label"))


def read(folder: Path, name: str, domain: str = "") -> Corpus:
    return load_corpus(DataOptions(name, dir=str(folder), domain=domain))


def told(corpus: Corpus) -> dict[str, list[bytes]]:
    """The texts of each domain, sorted: TFDS keeps them in an order of its own."""
    texts = zip(corpus.names, corpus.texts, strict=True)
    return {name: sorted(text.tobytes().splitlines(keepends=True)) for name, text in texts}


def test_a_class_label_or_a_named_feature_tells_the_domain(tmp_path: Path) -> None:
    folder = write_news(tmp_path, train=NEWS, test=NEWS[1:2])
    corpus = read(folder, "news")
    assert told(corpus) == {"Sports": [b"drei\n"], "World": [b"four\n", b"one two\n"]}
    assert [text.tobytes() for text in corpus.tests] == [b"drei\n", b""]
    # As authors would be: each a domain, and with one domain a client each a client.
    named = read(write_news(tmp_path, train=NEWS), "news", "title")
    assert told(named) == {"a": [b"four\n", b"one two\n"], "b": [b"drei\n", b"of nobody\n"]}
    dealt = deal_domains(named, 2, 2, domains_per_client=1, seed=0)
    assert sorted(owns.tolist() for owns in dealt.owns) == [[False, True], [True, False]]


def test_text_without_a_label_is_one_domain(tmp_path: Path) -> None:
    def plain(tfds: Any) -> dict[str, Any]:
        return {"text": tfds.features.Text(), "year": tfds.features.Scalar(dtype=np.int64)}

    splits = {
        "train": [{"text": "to be " * 20, "year": 1600}, {"text": "or not", "year": 1601}],
        "validation": [{"text": "that is", "year": 1601}],
    }
    folder = write_texts(tmp_path, "plays", splits, plain)
    corpus = read(folder, "plays")
    assert told(corpus) == {"all": [b"or not\n", b"to be " * 20 + b"\n"]}
    assert corpus.tests[0].tobytes() == b"that is\n"
    assert read(folder, "plays", "year").names == ("1600", "1601")


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_news(tmp_path, train=NEWS[:1], test=NEWS[1:2])
    lines = {
        ("news", ""): "data.domain=Sports: .* test texts of Sports, and none of it to train on",
        ("news", "author"): "data.domain=author: news has no such feature; choose one of descr",
        (
            "nws",
            "",
        ): "data.name=nws: did you mean news\\? .*a prepared copy, or set data.download=true",
    }
    for (name, domain), line in lines.items():
        with pytest.raises(InputError, match=f"^{line}") as caught:
            read(folder, name, domain)
        assert "\n" not in str(caught.value)

    def pair(tfds: Any) -> dict[str, Any]:
        return {"en": tfds.features.Text(), "de": tfds.features.Text()}

    rows = {"train": [{"en": "one", "de": "eins"}]}
    with pytest.raises(
        InputError, match=r"^data.name=pair: next_token needs one text; .*'de', 'en'"
    ):
        read(write_texts(tmp_path, "pair", rows, pair), "pair")

    def numbers(tfds: Any) -> dict[str, Any]:
        return {"text": tfds.features.Text()}

    rows = {"test": [{"text": "one"}]}
    with pytest.raises(InputError, match=r"^data.name=late: it has no text in a train split"):
        read(write_texts(tmp_path, "late", rows, numbers), "late")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    home = write_news(tmp_path, train=NEWS) / "news" / "1.0.0"
    (home / "news-train.array_record-00000-of-00001").write_bytes(b"no records")
    with pytest.raises(InputError, match=r"^data.name=news: .*is damaged"):
        read(tmp_path, "news")
