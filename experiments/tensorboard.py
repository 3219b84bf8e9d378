"""Writes TensorBoard event files with tensorboardX, without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmoe_jax.errors import InputError


class TensorBoard:
    """Writes the numbers of each round as scalars.

    Args:
      folder: folder of the event files; None to write nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        """Checks that the extra is installed; opens nothing yet."""
        self._folder = folder
        self._writer: Any = None
        if folder is not None:
            try:
                import tensorboardX  # noqa: F401
            except ImportError as error:
                remedy = "install the extra: pip install 'flexmoe_jax[tensorboard]'"
                raise InputError("tensorboard", True, remedy) from error

    def write(self, metrics: Mapping[str, object]) -> None:
        """Writes the numbers of a round."""
        if self._folder is None:
            return
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), write_to_disk=True)
        for key, value in metrics.items():
            if isinstance(value, int | float) and key != "round":
                self._writer.add_scalar(key, value, metrics["round"])

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            self._writer.close()
