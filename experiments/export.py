"""Writes a trained model into files that JAX alone can read.

    python -m experiments.export WORKDIR --what=assembled|client:7|client:anna --to=DIR

DIR then holds the parameters (safetensors), the compiled function of parameters and raw inputs
(StableHLO, for any batch size), a description of both (JSON) and a text on how to load them.
`assembled` is one model with all experts; it exists only if no part of the model stays with the
clients. `client:7` is the model of client 7, and `client:anna` that of the client with this id in
the data or the federation, with only the experts that this client holds. If the
run evaluates with `eval.prior`, the logarithm of its label shares is added to its outputs.

The model comes from the newest complete checkpoint, also if the run is not finished: the round is
printed, and is part of the description. The run itself is not changed. The data are read again, to
compute the preprocessing of inputs; --data_dir says where they are if they have moved.
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
from flexmoe_jax.npz import open_npz
from flexmoe_jax.reading import UnreadableError

ASSEMBLED = "assembled"


def export(workdir: Path, what: str, target: Path, data_dir: str | None = None) -> list[str]:
    """Writes a model of a run into a folder, which appears only when all its files are written.

    Args:
      workdir: folder of the run.
      what: `assembled`, or `client:N`.
      target: the folder to write; it must not exist, or must be empty.
      data_dir: the present folder of the run's data; None if they have not moved.

    Returns:
      Sentences that a user of the model should read.

    Raises:
      InputError: there is no such model, or the folder cannot be used; nothing is written then.
      OSError: a file cannot be read or written; nothing is left behind.
    """
    client = check(workdir, what, target)
    # Import JAX only now, so that a wrong folder is reported at once.
    from experiments.portable import make_portable

    portable = make_portable(workdir, client, data_dir)
    write_folder(target, portable.files)
    return list(portable.notes)


def check(workdir: Path, what: str, target: Path) -> int | None:
    """Checks the arguments as far as possible without the run's data.

    Returns:
      The client whose model is exported; None for all experts together.

    Raises:
      InputError: see `export`.
    """
    if not workdir.is_dir():
        raise InputError("WORKDIR", workdir, "there is no such folder; give that of a run")
    client = client_number(what, workdir)
    check_target(target)
    for library in ("safetensors", "flatbuffers"):
        if find_spec(library) is None:
            remedy = f"needs {library}; install the extra: pip install 'flexmoe_jax[export]'"
            raise InputError("--to", target, remedy)
    return client


def client_number(what: str, workdir: Path) -> int | None:
    """Returns the number of the client in `what`; None for all experts together.

    Raises:
      InputError: `what` is neither `assembled` nor the number or the id of a client.
    """
    if what == ASSEMBLED:
        return None
    if match := re.fullmatch(r"client:([0-9]{1,9})", what):
        return int(match[1])
    ids = _client_ids(workdir)
    if what.startswith("client:") and what.removeprefix("client:") in ids:
        return ids.index(what.removeprefix("client:"))
    some = f", or the id of one: {', '.join(ids[:5])}" if ids else ""
    remedy = f"give {ASSEMBLED}, or client:7 for client 7; they count from 0"
    raise InputError("--what", what, f"{remedy}{some}")


def _client_ids(workdir: Path) -> list[str]:
    """Returns who the clients of a run are, by their numbers; empty if its files do not say."""
    try:
        with open_npz(workdir / "arrays.npz") as arrays:
            return list(map(str, arrays.read("ids"))) if "ids" in arrays.names else []
    except (UnreadableError, OSError):
        return []


def check_target(target: Path) -> None:
    """Rejects a target that exists, unless it is an empty folder that can be replaced.

    Raises:
      InputError: the folder is not empty, is the current one or a mount point, or the target is not
        a folder.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError("--to", target, "is there and no folder; name a new one")
    if any(target.iterdir()):
        raise InputError("--to", target, "is not empty; name a new folder, or empty it")
    if target.samefile(os.curdir) or target.is_mount():
        raise InputError("--to", target, "cannot be replaced as a whole; name a new folder in it")


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files under a temporary name, and renames it in one step.

    If the target is a link to an empty folder, that folder is replaced.

    Raises:
      OSError: the folder cannot be written; only its parent folders may be left behind.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, content in files.items():
            with (unfinished / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        # mkdtemp gives access to the owner alone; use the usual permissions.
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
    """Exports a model of the run in `argv[1]`, and prints where the files are."""
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
    # Defined here, so that importing `export` defines no flags.
    flags.DEFINE_string("what", None, "assembled, or client:N for client N, by number or id")
    flags.DEFINE_string("to", None, "the folder to write")
    flags.DEFINE_string("data_dir", None, "where the run's data are, if they have moved")
    run_cli(main)
