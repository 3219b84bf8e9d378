"""Command lines that reject invalid input with a one-line message and exit code 2."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from experiments.shutdown import tolerate_lost_output
from experiments.user_files import call_in_file
from flexmoe_jax.errors import InputError
from flexmoe_jax.options import KINDS


def run_cli(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `main` under absl, and exits with the code that it returns.

    An `InputError` is printed as one line on stderr, with exit code 2. A file that cannot be read
    or written gives one line and exit code 1. The program continues if its output has no reader.
    """
    tolerate_lost_output()

    def guarded(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            return main(argv)
        except InputError as error:
            _refuse(str(error))
        except OSError as error:
            if error.filename is None:
                raise
            print(f"{error.filename}: {error.strerror}", file=sys.stderr)
            return 1

    app.run(guarded, flags_parser=_parse)
    raise AssertionError("absl exits with what main returns")


def refuse_words(argv: Sequence[str]) -> None:
    """Rejects positional arguments, for launchers that take only flags.

    Raises:
      InputError: naming the first argument.
    """
    if len(argv) > 1:
        # absl parses no flags after a positional argument.
        raise InputError("argument", argv[1], "give flags alone, as --name=value, and no bare --")


def user_path(field: str, given: str) -> Path:
    """Returns the path that a user gave, with `~` and `~name` expanded as in a shell.

    Raises:
      InputError: there is no such user.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise InputError(field, given, "has no such home folder; give the whole path") from error


def flat_fields(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, object]:
    """Maps the dotted name of every field of a config to its value."""
    fields: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, config_dict.ConfigDict):
            fields |= flat_fields(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the most similar of `names`."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0)[0]


class _ConfigParser(flags.ArgumentParser):
    """Loads a config file; the ml_collections flag itself handles the overrides.

    Attributes:
      config: the config that was loaded last; None if none was loaded.
    """

    def __init__(self, name: str) -> None:
        self.config: config_dict.ConfigDict | None = None
        self._name = name

    def parse(self, argument: str) -> config_dict.ConfigDict:
        file, *arguments = argument.split(":", 1)
        path, field = user_path(f"--{self._name}", file), f"--{self._name}"
        if not file:
            raise InputError(field, argument, "name a file, as experiments/configs/digits.py")
        config = call_in_file(field, path, "get_config", *arguments, examples="configs")
        if not isinstance(config, config_dict.ConfigDict):
            kind = type(config).__name__
            raise InputError(field, argument, f"get_config() returns a {kind}, not a ConfigDict")
        config.lock()
        self.config = config
        return config


# The words in which ml_collections looks for overrides; by itself it does not read flag files.
_words: list[str] = []


def define_config(name: str, help_string: str) -> None:
    """Defines the config flag `--NAME=FILE` and its overrides `--NAME.field=value`."""
    config_flags.DEFINE_config_file(name, None, help_string, sys_argv=_words)
    flags.FLAGS[name].parser = _ConfigParser(name)


def read_config(name: str) -> config_dict.ConfigDict:
    """Returns the config of a flag.

    Raises:
      InputError: no file was given, or its config lacks a field.
    """
    config = flags.FLAGS[name].value
    if config is None:
        raise InputError(f"--{name}", None, "name a file, as experiments/configs/digits.py")
    from experiments.configs import base

    given = flat_fields(config)
    for field in flat_fields(base.get_config()):
        if field not in given:
            file = config_flags.get_config_filename(flags.FLAGS[name])
            remedy = f"has no field {field}; begin with base.get_config() of experiments/configs"
            raise InputError(f"--{name}", file, remedy)
    found: config_dict.ConfigDict = config
    return found


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        words = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
        _words[:] = _last_of_each(words)
        return list(flags.FLAGS([argv[0], *_words]))
    except Exception as error:  # ml_collections passes on any exception
        _refuse(_explained(_words, error))


def _last_of_each(words: Sequence[str]) -> list[str]:
    """Leaves out overrides of a config's field that a later one replaces.

    Of a tuple, ml_collections would otherwise join them.
    """
    groups: list[list[str]] = []  # A flag, and its value if that is a word of its own.
    for word in words:
        begins = re.match(r"--?[A-Za-z]", word) or not groups
        if begins or "=" in groups[-1][0] or len(groups[-1]) > 1:
            groups.append([word])
        else:
            groups[-1].append(word)
    fields = [re.match(r"--?(config\.[\w.]+)", group[0]) for group in groups]
    last = {field[1]: place for place, field in enumerate(fields) if field}
    pairs = enumerate(zip(groups, fields, strict=True))
    kept = (group for place, (group, field) in pairs if not field or last[field[1]] == place)
    return [word for group in kept for word in group]


def _explained(words: Sequence[str], error: Exception) -> str:
    """Returns a line that explains the error in a command line."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, InputError):
        return str(cause)
    line, configs = " ".join(str(error).split()), []
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if isinstance(flag.parser, _ConfigParser):
            configs.append(f"{name}.rounds")
            overrides = [re.match(rf"--?(?:no)?{name}\.([^=]*)", word) for word in words]
            names = [match[1] for match in overrides if match]
            if flag.parser.config is None and names:
                return f"--{name}.{names[0]}: stands before, or without, --{name}=FILE"
            if flag.parser.config is not None:
                line = _of_overrides(name, flag.parser.config, names, line) or line
    if isinstance(error, flags.UnrecognizedFlagError):
        near = nearest(error.flagname, [*flags.FLAGS, *configs])
        return f"--{error.flagname}: no such flag; did you mean --{near}? --help lists them all"
    return line


def _of_overrides(
    flag: str, config: config_dict.ConfigDict, names: Sequence[str], line: str
) -> str:
    """Returns a line about an override that does not fit its config; empty if none is found."""
    fields = flat_fields(config)
    groups = {field[: dot.start()] for field in fields for dot in re.finditer(r"\.", field)}
    for name in names:
        if name not in fields and name not in groups:
            return f"{flag}.{name}: no such field; did you mean {flag}.{nearest(name, fields)}?"
    match = re.match(rf"flag --{flag}\.([\w.]+)=(.*?): ", line)
    if not match:
        return ""
    if match[1] in groups:
        return f"{flag}.{match[1]}={match[2]}: is a group of fields: set one of them"
    kind = KINDS.get(type(fields[match[1]]))
    return f"{flag}.{match[1]}={match[2]}: give {kind}" if kind else ""


def _refuse(line: str) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(2)
