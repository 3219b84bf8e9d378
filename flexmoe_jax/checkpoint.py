"""Checkpoints of a federation's state, written atomically by orbax."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from flexmoe_jax.types import State

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run, one for each saved round; the newest few are kept.

    Args:
      folder: where they lie; made if it is not there.
      keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Only remembers the folder."""
        self._folder, self._keep = folder.resolve(), keep

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Opened when first needed: loading orbax would hold up a run's first round.
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The newest saved round, or None."""
        if not self._folder.exists():
            return None
        step: int | None = self._manager.latest_step()
        return step

    def save(self, state: State) -> None:
        """Saves the state under its number of completed rounds; does nothing if it is there."""
        import orbax.checkpoint as ocp

        step = int(state.round)
        if step != self.latest():
            self._manager.save(step, args=ocp.args.StandardSave(_on_host(_with_raw_key(state))))

    def restore(self, like: State) -> State:
        """Reads the newest state; `like` gives its structure, shapes and types."""
        import orbax.checkpoint as ocp

        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _with_raw_key(like))
        restored: State = self._manager.restore(
            self.latest(), args=ocp.args.StandardRestore(target)
        )
        return restored._replace(key=jax.random.wrap_key_data(restored.key))

    def close(self) -> None:
        """Ends the manager's threads, if it has any."""
        if "_manager" in self.__dict__:
            self._manager.close()


def _with_raw_key(state: State) -> State:
    return state._replace(key=jax.random.key_data(state.key))


def _on_host(state: State) -> State:
    # orbax would cut every replicated array into a part for each device, by a program of its own.
    if jax.process_count() > 1:
        return state
    host: State = jax.device_get(state)
    return host
