"""Runs Python files that users write: configs and studies."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import traceback
from pathlib import Path

from flexmoe_jax.errors import InputError


def call_in_file(field: str, path: Path, function: str, *arguments: str, examples: str) -> object:
    """Runs a Python file, and calls a function that it defines.

    Args:
      field: the flag that names the file.
      path: path of the file.
      function: name of the function.
      *arguments: arguments of the function.
      examples: folder of `experiments` that holds files of this kind.

    Returns:
      the return value of the function.

    Raises:
      InputError: the file or function does not exist, or fails; the message names the line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(field, path, f"{what}; experiments/{examples}/ holds examples")
    # Dataclasses look up their module in `sys.modules` by its name.
    name = f"{function}_of_{path.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.machinery.ModuleSpec(name, loader, origin=str(path))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
        if not callable(found := getattr(module, function, None)):
            remedy = f"does not define {function}(); experiments/{examples}/ holds examples"
            raise InputError(field, path, remedy)
        return found(*arguments)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(field, path, _where(error, path)) from error


def _where(error: BaseException, path: Path) -> str:
    """Describes an error, with the line of the file where it occurred."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError) and error.lineno:
        lines.append(error.lineno)
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"
