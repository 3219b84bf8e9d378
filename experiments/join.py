"""Takes part in a federation: a client.

    python -m experiments.join --server=HOST:8080 --name=anna --data=anna.npz --certificate=ca.crt

The file holds the client's own examples: arrays `train_images` and `train_labels`, or
`train_tokens`, and `test_` arrays of the same names if the client has test examples of its own. A
folder of texts (`*.txt`, UTF-8) also works; the last tenth of each text is then for testing. All
examples stay on this machine. So does the client's own part of the model, in --folder: private
parts, gates, and the residuals of compression. The same command continues after any interruption.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from absl import flags

from experiments.cli import refuse_words, run_cli, user_path
from experiments.deploying import require_flower, show_log
from experiments.shutdown import Wish, end_with_input
from flexmoe_jax.errors import InputError
from flexmoe_jax.options import DataOptions

_SERVER = flags.DEFINE_string("server", None, "HOST:PORT of the server.")
_NAME = flags.DEFINE_string("name", None, "Name of this client in the federation.")
_DATA = flags.DEFINE_string("data", None, "The client's own examples: an .npz file, or texts.")
_LENGTH = flags.DEFINE_integer(
    "length", DataOptions.length, "Bytes of an example of texts: the server's data.length.", 1
)
_MEMORY = flags.DEFINE_integer(
    "memory", 0, "Bytes for training, where clients.capacity=memory.", lower_bound=0
)
_FOLDER = flags.DEFINE_string("folder", None, "What the client owns; clients/NAME by default.")
_CERTIFICATE = flags.DEFINE_string("certificate", None, "ca.crt, by which the server is known.")
_WITH_INPUT = flags.DEFINE_bool(
    "end_with_input", False, "End as if by SIGTERM once standard input is closed."
)
_TELL_LABELS = flags.DEFINE_bool(
    "tell_label_shares",
    False,
    "Tell the server how often each class occurs, where fitness.profile=beyond_labels asks for it.",
)
_KEY = flags.DEFINE_string("key", None, "Private key of this client, where the server asks for it.")


def main(argv: list[str]) -> int:
    """Takes part in a federation until a signal ends it.

    Returns:
      exit code: 128 + the number of the signal that ended it.

    Raises:
      InputError: the flags or the data are invalid.
    """
    refuse_words(argv)
    server, name, data = (_given(flag) for flag in (_SERVER, _NAME, _DATA))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise InputError("--name", name, "use letters, digits and _ . - alone")
    if not re.fullmatch(r"\S+:\d{1,5}", server):
        raise InputError("--server", server, "give HOST:PORT, as 127.0.0.1:8080")
    require_flower()
    show_log()
    from experiments.deploying.credentials import read_private_key, read_root

    root, key = _file(_CERTIFICATE, read_root), _file(_KEY, read_private_key)
    if key is not None and root is None:
        raise InputError("--key", _KEY.value, "needs --certificate=ca.crt as well")
    if _WITH_INPUT.value:
        end_with_input()
    return join(server, name, user_path("--data", data), root, key)


def _given(flag: flags.FlagHolder[str | None]) -> str:
    if not flag.value:
        raise InputError(f"--{flag.name}", flag.value, "is needed; see --help")
    return flag.value


def _file(flag: flags.FlagHolder[str | None], check: Callable[[Path], Path]) -> Path | None:
    if not flag.value:
        return None
    path = user_path(f"--{flag.name}", flag.value)
    if not path.is_file():
        raise InputError(f"--{flag.name}", flag.value, "there is no such file")
    return check(path.resolve())


def join(server: str, name: str, data: Path, root: Path | None, key: Path | None) -> int:
    """Answers the server's messages until a signal arrives."""
    from experiments.deploying.checks import read_examples

    arrays, tests = read_examples(data, _LENGTH.value)
    # Import JAX only now, so that a wrong file is reported at once.
    from experiments.deploying import joining
    from experiments.deploying.flower import SuperNode
    from experiments.devices import prepare_devices
    from flexmoe_jax.deploy import Worker, answer_calls

    prepare_devices(1)  # This also caches compiled programs, which makes a restart fast.
    size = len(next(iter(arrays.values())))
    folder = user_path("--folder", _FOLDER.value or f"clients/{name}")
    over = threading.Event()

    with tempfile.TemporaryDirectory(prefix="flexmoe-") as home:
        socket = Path(home) / "client.sock"
        together = partial(joining.join, name, arrays, tests)
        worker = Worker(name, size, _MEMORY.value, together, folder, _TELL_LABELS.value)
        calls = answer_calls(socket, worker.answer)
        print(f"{name}: connecting to {server}", flush=True)
        node = SuperNode(Path(home), server, socket, name, root, key)
        try:
            with Wish(f"{name}: ended at once", passed_on=lambda times: over.set()) as wish:
                while not over.wait(1.0):
                    pass
        finally:
            node.close()
            calls.close()
    return 128 + wish.number


if __name__ == "__main__":
    run_cli(main)
