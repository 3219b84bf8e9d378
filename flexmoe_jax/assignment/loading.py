"""Libraries that are loaded when they are first needed."""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any


def load(name: str) -> Any:
    """The module of that name, without types.

    A large library whose import is interrupted is half there for the rest of the process, and
    cannot be imported again. Signals interrupt the main thread alone, so it waits for another one.
    """
    if name not in sys.modules and threading.current_thread() is threading.main_thread():
        try:
            importer = threading.Thread(target=_try, args=(name,), daemon=True)
            importer.start()
        except RuntimeError:  # The interpreter is shutting down.
            return importlib.import_module(name)
        importer.join()
    return importlib.import_module(name)


def _try(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception:
        # Whoever asked meets it by itself.
        return
