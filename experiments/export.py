"""Writes a trained model into files that JAX alone can read.

    python -m experiments.export WORKDIR --what=assembled|client:7 --to=DIR [--data_dir=DIR]

DIR then holds the parameters (safetensors), the compiled function of parameters and raw inputs
(StableHLO, for any batch size), a description of both (JSON) and a text on how to load them.
`assembled` is all experts in one model, which exists where no part of it stays with clients;
`client:7` is the model of client 7, with the experts that it holds and no others, and with the
logarithm of its label shares added to its outputs where the run evaluates with `eval.prior`.

The model is that of the newest whole checkpoint, also of a run that is not finished: its round is
said, and stands in the description. The run itself is left as it is. The data are read once more,
for what is done to inputs; --data_dir says where they are if they have moved.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from absl import flags

from experiments.cli import run_cli, user_path
from flexmoe_jax.errors import InputError, printable

ASSEMBLED = "assembled"


def export(workdir: Path, what: str, target: Path, data_dir: str | None = None) -> list[str]:
    """Writes a model of a run into a folder, which is there when all its files are.

    Args:
      workdir: of the run.
      what: `assembled`, or `client:N`.
      target: the folder to write; must not be there, or be empty.
      data_dir: where the run's data are now; None for where they were.

    Returns:
      Sentences on what a user should know of the model.

    Raises:
      InputError: there is no such model, or the folder cannot be used; nothing is written then.
      OSError: a file cannot be read or written; nothing is left behind.
    """
    client = check(workdir, what, target)
    # Whoever gave a wrong folder need not wait for JAX.
    from experiments.portable import make_portable

    portable = make_portable(workdir, client, data_dir)
    write_folder(target, portable.files)
    return list(portable.notes)


def check(workdir: Path, what: str, target: Path) -> int | None:
    """Refuses what can be refused without the run's data.

    Returns:
      The client whose model is asked for; None for all experts together.

    Raises:
      InputError: see `export`.
    """
    client = client_number(what)
    if not workdir.is_dir():
        raise InputError("WORKDIR", workdir, "there is no such folder; give that of a run")
    check_target(target)
    for library in ("safetensors", "flatbuffers"):
        if find_spec(library) is None:
            remedy = f"needs {library}; install the extra: pip install 'flexmoe_jax[export]'"
            raise InputError("--to", target, remedy)
    return client


def client_number(what: str) -> int | None:
    """The client that is asked for; None for all experts together.

    Raises:
      InputError: neither is.
    """
    if what == ASSEMBLED:
        return None
    if match := re.fullmatch(r"client:([0-9]{1,9})", what):
        return int(match[1])
    raise InputError(
        "--what", what, f"give {ASSEMBLED}, or client:7 for client 7; they count from 0"
    )


def check_target(target: Path) -> None:
    """Refuses a folder that is there and holds anything.

    Raises:
      InputError: it does, or is something else.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError("--to", target, "is there and no folder; name a new one")
    if any(target.iterdir()):
        raise InputError("--to", target, "is not empty; name a new folder, or empty it")


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files, which gets its name in one step.

    Raises:
      OSError: it cannot be written; nothing is left behind but folders above it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent.resolve()))
    try:
        for name, content in files.items():
            with (unfinished / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        # A temporary folder is for its owner alone.
        unfinished.chmod(0o777 & ~_umask())
        os.replace(unfinished, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main(argv: list[str]) -> None:
    """Exports from the run in `argv[1]`, and prints where the files are."""
    if len(argv) != 2:
        raise InputError("WORKDIR", " ".join(argv[1:]) or "(none)", "give the folder of one run")
    given = flags.FLAGS
    if not given.what:
        raise InputError("--what", given.what, f"give {ASSEMBLED}, or client:7 for client 7")
    if not given.to:
        raise InputError("--to", given.to, "name the folder to write")
    target = user_path("--to", given.to)
    folder = None if given.data_dir is None else str(user_path("--data_dir", given.data_dir))
    workdir = user_path("WORKDIR", argv[1])
    check(workdir, given.what, target)
    from experiments.devices import prepare_devices

    prepare_devices(1)
    notes = export(workdir, given.what, target, folder)
    for line in notes:
        print(printable(line))
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{printable(target)} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    # Declared here, so that whoever imports `export` gets no flags along with it.
    flags.DEFINE_string("what", None, "assembled, or client:N for the model of client N")
    flags.DEFINE_string("to", None, "the folder to write")
    flags.DEFINE_string("data_dir", None, "where the run's data are, if they have moved")
    run_cli(main)
