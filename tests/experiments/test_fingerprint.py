"""What identifies a compiled program: equal fingerprints must mean equal programs."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from experiments.environment import environment
from experiments.fingerprint import UnknownError, fingerprint

ROOT = Path(__file__).parents[2]


class Pair(NamedTuple):
    a: object
    b: object


@dataclass(frozen=True)
class Record:
    a: object = 1


def enclosing(value):
    def inner(x):
        return x * value

    return inner


def jitted(**options):
    def inner(x, n):
        return x * n

    return jax.jit(inner, **options)


class Sizes(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x)


# Each line: the same content made twice, and another.
KINDS = {
    "number": lambda: (1, 1, 2),
    "type": lambda: (1, 1, 1.0),
    "truth": lambda: (True, True, 1),
    "text": lambda: ("a", "a", b"a"),
    "order": lambda: ((1, 2), (1, 2), (2, 1)),
    "nesting": lambda: (((1,), 2), ((1,), 2), ((1, 2),)),
    "mapping": lambda: ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 1}),
    "set": lambda: ({"a", "b"}, {"b", "a"}, {"a", "c"}),
    "array": lambda: (np.arange(3), np.arange(3), np.arange(1, 4)),
    "array type": lambda: (np.zeros(2, np.int32), np.zeros(2, np.int32), np.zeros(2, np.float32)),
    "array shape": lambda: (np.zeros((2, 1)), np.zeros((2, 1)), np.zeros((1, 2))),
    "device array": lambda: (jnp.ones(2), jnp.ones(2), jnp.zeros(2)),
    "record": lambda: (Record(2), Record(2), Record(3)),
    "kind of record": lambda: (Pair(1, 2), Pair(1, 2), (1, 2)),
    "closure": lambda: (enclosing(2), enclosing(2), enclosing(3)),
    "one line": lambda: (*[lambda x: x + 1 for _ in range(2)], lambda x: x - 1),
    "one line, another number": lambda: (*[lambda x: x + 1 for _ in range(2)], lambda x: x + 2),
    "within": lambda: (*[lambda: lambda x: x + 1 for _ in range(2)], lambda: lambda x: x + 2),
    "default": lambda: (*[functools.partial(enclosing, 1) for _ in range(2)], enclosing),
    "method": lambda: (Record(1).__repr__, Record(1).__repr__, Record(2).__repr__),
    "optimiser": lambda: (optax.adam(0.1), optax.adam(0.1), optax.adam(0.2)),
    "chain": lambda: (
        *[optax.chain(optax.clip(1.0), optax.sgd(0.1, 0.9)) for _ in range(2)],
        optax.chain(optax.clip(1.0), optax.sgd(0.1, 0.8)),
    ),
    "module": lambda: (Sizes(3), Sizes(3), Sizes(4)),
    "jit": lambda: (jitted(), jitted(), jitted(static_argnums=1)),
    "shape": lambda: (
        *[jax.ShapeDtypeStruct((2,), np.float32) for _ in range(2)],
        jax.ShapeDtypeStruct((2,), jnp.bfloat16),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_content_and_no_other_has_the_same_fingerprint(kind):
    once, again, other = map(fingerprint, KINDS[kind]())
    assert once == again != other


def test_an_object_met_twice_is_not_two_equal_ones_by_chance():
    ring: list = [1]
    ring.append(ring)
    other: list = [1]
    other.append([other])
    assert fingerprint(ring) != fingerprint(other)


class Unknown:
    """Its content could be anything."""


@dataclass
class Hidden:
    """No module holds it, so its code may be anywhere."""


hidden, Hidden = Hidden(), None  # type: ignore[misc, assignment]


@pytest.mark.parametrize(
    "thing",
    [
        Unknown(),
        hidden,
        [{"a": Unknown()}],
        enclosing(Unknown()),
        iter((1,)),
        np.array([None]),
        eval("lambda x: x"),
    ],
)
def test_what_is_not_known_is_refused(thing):
    with pytest.raises(UnknownError):
        fingerprint(thing)


def test_it_is_the_same_in_every_process():
    words = (
        "import optax; from experiments.fingerprint import fingerprint;"
        "from experiments.environment import environment;"
        "print(fingerprint(({'b', 'a', 'c'}, {'x': optax.adam(0.1), 'y': {3, 4}})), environment())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", words],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(found) == 1


def test_surroundings_tell_of_changed_code_and_settings(tmp_path, monkeypatch):
    path = tmp_path / "code_of_a_user.py"
    path.write_text("x = 1\n")
    before = environment()
    spec = importlib.util.spec_from_file_location("code_of_a_user", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "code_of_a_user", module)
    loaded = environment()
    module.x = 2
    with_a_value = environment()
    path.write_text("x = 12\n")
    edited = environment()
    # What a user's file may import from beside it counts, too.
    (tmp_path / "beside.py").touch()
    with_another = environment()
    with jax.enable_x64(True):
        wide = environment()
    assert len({before, loaded, with_a_value, edited, with_another, wide}) == 6
    assert environment() == with_another
    # Functions may compute with it.
    module.settings = SimpleNamespace(scale=2)
    with pytest.raises(UnknownError, match=r"code_of_a_user\.settings"):
        environment()
