"""Command lines that refuse bad input in one line, with exit code 2."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_dict

from flexmoe_jax.errors import InputError

_NO_CONFIG = "does not define get_config(); experiments/configs/ holds examples"


def run_cli(main: Callable[[list[str]], None]) -> None:
    """Runs `main` under absl; an `InputError` becomes one line on stderr and exit code 2."""

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except InputError as error:
            _refuse(str(error))

    app.run(guarded, flags_parser=_parse)


def flat_fields(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, object]:
    """Maps the dotted name of every field of a config to its value."""
    fields: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, config_dict.ConfigDict):
            fields |= flat_fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def nearest(name: str, names: Iterable[str]) -> str:
    """The name most like the one given."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0)[0]


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return list(flags.FLAGS(argv))
    except flags.UnrecognizedFlagError as error:
        near = nearest(error.flagname, [*flags.FLAGS, "config.rounds"])
        _refuse(f"--{error.flagname}: no such flag; did you mean --{near}? --help lists them all")
    except (AttributeError, KeyError) as error:
        _refuse(_unknown_field(argv, error))
    except (flags.Error, TypeError, ValueError) as error:
        _refuse(_wrong_value(argv, error))


def _unknown_field(argv: Sequence[str], error: Exception) -> str:
    """Names the field of an override that the config does not have, and the nearest one it has."""
    given = [re.match(r"--(?:no)?config\.([\w.]+)", argument) for argument in argv]
    names = [match[1] for match in given if match]
    fields = flat_fields(_load_config(argv))
    for name in names:
        if name not in fields:
            near = nearest(name, fields)
            return f"config.{name}: no such field; did you mean config.{near}?"
    return " ".join(str(error).split())


def read_config(value: object, path: str | None) -> config_dict.ConfigDict:
    """The config of a flag, or a refusal where its file gave none.

    Raises:
      InputError: no file was named, or it cannot be read as a config.
    """
    if path is None:
        raise InputError("--config", path, "name a file, as experiments/configs/digits.py")
    if not isinstance(value, config_dict.ConfigDict):
        raise InputError("--config", path, "no such file; experiments/configs/ holds examples")
    return value


def _load_config(argv: Sequence[str]) -> config_dict.ConfigDict:
    path = next(a.split("=", 1)[1] for a in argv if a.startswith("--config="))
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        _refuse(f"--config={path}: {_NO_CONFIG}")
    config: config_dict.ConfigDict = module.get_config()
    return config


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: 'a tuple, as "(32, 64)"',
}


def _wrong_value(argv: Sequence[str], error: Exception) -> str:
    """Names the field, what was given, and what kind of value belongs there."""
    line = " ".join(str(error).split())
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", line)
    if not match:
        return line
    kind = _KINDS.get(type(flat_fields(_load_config(argv)).get(match[1])))
    remedy = f"give {kind}" if kind else "is a group of fields: set one of them"
    return f"config.{match[1]}={match[2]}: {remedy}"


def _refuse(line: str) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(2)
