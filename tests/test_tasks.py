from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax import tasks
from flexmoe_jax.errors import InputError


@given(st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=1, max_size=8))
def test_a_hit_is_where_the_first_of_the_greatest_logits_is_right(rows):
    logits = jnp.asarray(rows, jnp.float32)
    labels = jnp.arange(len(rows), dtype=jnp.int32) % 3
    hits = tasks.classification().hits(logits, {"labels": labels})
    assert hits.tolist() == (np.argmax(np.asarray(rows), axis=1) == np.asarray(labels)).tolist()


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_every_byte_is_a_token_of_a_vocabulary_of_256(place):
    text = {"tokens": place(np.array([[0, 255, 7]], np.uint8))}
    tasks.next_token().check(text, (2, 256))
    with pytest.raises(InputError, match="tokens=255: the model's vocabulary has 255"):
        tasks.next_token().check(text, (2, 255))
