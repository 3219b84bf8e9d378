"""Imports large libraries on first use."""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any


def load(name: str) -> Any:
    """Imports the module of that name (untyped).

    If the import of a large library is interrupted, the library stays half loaded and cannot be
    imported again in this process. Signals interrupt only the main thread, so another thread does
    the import and the main thread waits.
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
        # The caller's own import raises the same error.
        return
