"""Starts a training run: handles flags, the processes that share it, signals, and its end.

Modules that take seconds to import are imported late. Invalid flags are thus rejected at once, and
a process that only watches another one needs little memory.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from signal import SIGTERM, Signals
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict

from experiments.children import Runner
from experiments.cli import (
    define_config,
    read_config,
    refuse_words,
    run_cli,
    user_path,
)
from experiments.fields import check_fields
from experiments.program import Program, advice, asked, find_program
from experiments.rendezvous import rendezvous
from experiments.shutdown import Wish, end_with_input, library_errors_to_parent
from flexmoe_jax.errors import InputError, printable

define_config("config", "Config file of the experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_WITH_INPUT = flags.DEFINE_bool(
    "end_with_input", False, "End as if by SIGTERM once standard input is closed."
)

_REPORT = flags.DEFINE_bool(
    "report", True, "Write the report's page at the end; without it: python -m experiments.report."
)

# Words in the messages of JAX and its libraries when another process of the program is gone.
_LOST = ("gloo", "nccl", "coordination", "distributed service", "heartbeat")
_LAST_WORDS_SECONDS = 2.0


def run() -> NoReturn:
    """Runs `python -m experiments.train` to its end."""
    # --help shows only the flags of the started module, so register these flags for it.
    ours = (__name__, find_program.__module__)
    found = [flag for module in ours for flag in flags.FLAGS.get_flags_for_module(module)]
    for flag in [flags.FLAGS["config"], *found]:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    run_cli(main)


def main(argv: list[str]) -> int:
    """Trains, then writes the report.

    Returns:
      exit code: 0, or 1 if the run diverged or a file fails, or 128 + the number of the signal that
      ended it, with everything saved.

    Raises:
      InputError: the flags or the config are invalid; nothing is written then.
    """
    refuse_words(argv)
    config = read_config("config")
    check_fields(config)
    if not _WORKDIR.value:
        raise InputError("--workdir", _WORKDIR.value, "name a folder for the run, as runs/digits")
    folder = user_path("--workdir", _WORKDIR.value)
    program = find_program(asked(), os.environ, os.getpid())
    if program is not None and not _WITH_INPUT.value:
        return _watch(program, config, folder)
    if program is None and (line := advice(asked(), os.environ)):
        print(line, flush=True)
    if _WITH_INPUT.value:
        end_with_input()
    return _alone(config, folder) if program is None else _together(config, folder, program)


def _alone(config: ConfigDict, folder: Path) -> int:
    try:
        return _train(config, folder, None)
    except OSError as error:
        print(_fault(error, folder), file=sys.stderr)
        return 1


def _together(config: ConfigDict, folder: Path, program: Program) -> int:
    """Trains in a child started by `_watch`; exits at once on error, even if no other child fails.

    A normal exit would wait minutes for other processes, which in turn wait for this one.
    """
    library_errors_to_parent()
    try:
        return _train(config, folder, program)
    except Exception as error:
        # An InputError may quote anything, so its text is not searched for a lost process.
        if isinstance(error, InputError):
            code, line = 2, str(error)
        elif isinstance(error, OSError):
            code, line = 1, _fault(error, folder)
        else:
            code, line = 1, _lost(str(error), folder) or traceback.format_exc().rstrip()
        print(line, file=sys.stderr)
        if program.number == 0:
            # The other processes end with process 0; give them time to print the same error.
            time.sleep(_LAST_WORDS_SECONDS)
        _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(config: ConfigDict, folder: Path, program: Program | None) -> int:
    import jax

    from experiments.devices import prepare_devices

    prepare_devices(config.execution.devices, program)
    from experiments.train import train
    from experiments.workdir import Workdir

    workdir = Workdir(folder, writes=jax.process_index() == 0)
    with Wish(f"ended at once; the same command goes on with {printable(folder)}") as wish:
        workdir.keep_others_out(create=False)
        status = train(config, workdir, stop=lambda: wish.number > 0)
        if program is not None:
            # The other processes need not wait for the report.
            jax.distributed.shutdown()
        if workdir.writes and not _REPORT.value:
            print(status)
        elif workdir.writes:
            print(f"{status} · report: {printable(_write_page(folder))}")
    if status == "interrupted":
        # The signal may have reached another process of the program.
        return 128 + (wish.number or SIGTERM)
    return 1 if status == "diverged" else 0


def _write_page(folder: Path) -> Path:
    """Writes the report of the run.

    Raises:
      OSError: the page cannot be written. Its path is not the user's choice, so this is no
        `InputError`.
    """
    from experiments.report import write_report

    try:
        return write_report([folder], folder / "report" / "index.html")
    except InputError as error:
        raise error.__cause__ or error from None


def _fault(fault: OSError, folder: Path) -> str:
    """Returns a line about a file that cannot be read or written."""
    return (
        f"{printable(fault.filename or folder)}: {fault.strerror or fault}; once that is put right "
        "(free some space?), the same command goes on from the newest checkpoint"
    )


def _lost(said: str, folder: Path) -> str:
    """Returns a line about a lost process; empty if the error is not about a lost process."""
    if not any(word in said.lower() for word in _LOST):
        return ""
    return (
        "another process of this run has ended, or cannot be reached; "
        f"the same commands go on with {printable(folder)} from the newest checkpoint"
    )


def _watch(program: Program, config: ConfigDict, folder: Path) -> int:
    """Runs this process's part of a program in a child process.

    If a peer is gone, JAX aborts the process from a background thread, with a core dump. The
    watching process reports this in one line.
    """
    from experiments.workdir import Workdir, as_json, flatten

    devices = config.execution.devices
    if program.size and devices % program.size:
        remedy = f"give a multiple of --process_count={program.size}, or 0"
        raise InputError("execution.devices", devices, remedy)
    if program.number == 0:
        Workdir(folder).keep_others_out(create=False)
    ours = ["--end_with_input", "--distributed=auto"]
    if program.coordinator:
        rendezvous(program, flatten(as_json(config)), lambda line: print(line, flush=True))
        ours[1:] = [
            f"--coordinator={program.coordinator}",
            f"--process_count={program.size}",
            f"--process_id={program.number}",
        ]
    if program.local is not None:
        os.environ.setdefault("JAX_LOCAL_DEVICE_IDS", str(program.local))
    with Runner() as runner:
        # The user's flags come last and take precedence.
        words = [sys.executable, "-m", "experiments.train", *ours, *sys.argv[1:]]
        code, said = runner.run(words)
    if code >= 0:
        return code
    if code == -SIGTERM and runner.caught:
        return 128 + runner.caught
    lost = _lost(said, folder)
    print(lost or f"{said}\nended by {Signals(-code).name}".lstrip(), file=sys.stderr)
    return 1 if lost else 128 - code
