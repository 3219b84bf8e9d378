"""Trains one federation with real clients: the server.

    python -m experiments.serve --config=experiments/configs/digits.py --workdir=runs/served \
        --config.clients.count=4 --host=192.0.2.7 --certificates=keys --client_keys=clients

Clients connect with `python -m experiments.join`; the first round begins once `clients.count` of
them are connected. The run's folder is like that of `experiments.train`, and the same command
continues after any interruption. The data set in the config is the server's own: its test split is
the common test set, and the rest gives classes, shapes and the mean and deviation of inputs.

Flower's SuperLink transports the messages, and is restarted if it fails. To serve other machines,
it needs certificates (`--make_certificates=DIR` writes some for a trial), and the public keys of
the clients that may connect.
"""

from __future__ import annotations

import ipaddress
import tempfile
from contextlib import closing
from pathlib import Path
from signal import SIGTERM

from absl import flags
from ml_collections import ConfigDict

from experiments.cli import define_config, read_config, refuse_words, run_cli, user_path
from experiments.deploying import require_flower, show_log
from experiments.fields import check_fields
from experiments.shutdown import Wish, end_with_input
from flexmoe_jax.errors import InputError, StoppedError, printable

define_config("config", "Config file of the experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address that clients reach.")
_PORT = flags.DEFINE_integer("port", 8080, "Port of it.", lower_bound=1, upper_bound=65535)
_CERTIFICATES = flags.DEFINE_string(
    "certificates", None, "Folder with ca.crt, server.pem and server.key."
)
_KEYS = flags.DEFINE_string("client_keys", None, "Folder of *.pub: the clients that may come.")
_INSECURE = flags.DEFINE_bool("insecure", False, "Plain connections outside of this machine, too.")
_MAKE = flags.DEFINE_string(
    "make_certificates", None, "Only write certificates for --host into this folder."
)
_REPORT = flags.DEFINE_bool("report", True, "Write the report's page at the end.")
_WITH_INPUT = flags.DEFINE_bool(
    "end_with_input", False, "End as if by SIGTERM once standard input is closed."
)


def main(argv: list[str]) -> int:
    """Serves a run to its end.

    Returns:
      exit code: 0, or 1 if the run diverged, or 128 + the number of the signal that ended it.

    Raises:
      InputError: the flags or the config are invalid; nothing is written then.
    """
    refuse_words(argv)
    if _MAKE.value:
        from experiments.deploying.certificates import make_certificates

        folder = user_path("--make_certificates", _MAKE.value)
        make_certificates(folder, _HOST.value)
        print(f"{printable(folder)}: ca.crt for clients; server.pem and server.key for the server")
        return 0
    config = read_config("config")
    check_fields(config)
    if not _WORKDIR.value:
        raise InputError("--workdir", _WORKDIR.value, "name a folder for the run, as runs/served")
    require_flower()
    show_log()
    if _WITH_INPUT.value:
        end_with_input()
    return serve(config, user_path("--workdir", _WORKDIR.value))


def serve(config: ConfigDict, folder: Path) -> int:
    """Starts Flower, and trains with the clients that connect."""
    from experiments.deploying.checks import check_deployable
    from experiments.deploying.credentials import read_public_keys, read_tls
    from experiments.deploying.flower import SuperLink, require_free

    check_deployable(config)
    given = _CERTIFICATES.value, _KEYS.value
    if not all(given) and not _INSECURE.value and not _is_local(_HOST.value):
        remedy = "is reached from other machines: give --certificates=DIR and --client_keys=DIR"
        raise InputError("--host", _HOST.value, f"{remedy} (or say --insecure)")
    tls = read_tls(user_path("--certificates", given[0]), _HOST.value) if given[0] else None
    keys = read_public_keys(user_path("--client_keys", given[1])) if given[1] else None
    if keys is not None and tls is None:
        raise InputError("--client_keys", given[1], "needs --certificates=DIR as well")
    require_free(_HOST.value, _PORT.value)
    # Import JAX only now, so that a wrong flag is reported at once.
    from experiments.deploying.serving import Deployment, OwnData
    from experiments.devices import prepare_devices
    from experiments.train import train
    from experiments.workdir import Workdir
    from flexmoe_jax.deploy import FlowerCarrier, Post

    prepare_devices(1)
    config.checkpoint.every = 1  # Clients cannot return to a round before the last one they know.
    workdir = Workdir(folder)
    workdir.keep_others_out(create=False)
    workdir.check(config)
    own = OwnData(config)  # Whatever does not fit is refused now, before any client comes.
    with tempfile.TemporaryDirectory(prefix="flexmoe-") as home:
        socket = Path(home) / "server.sock"
        carrier = FlowerCarrier(socket)
        link = SuperLink(Path(home), _HOST.value, _PORT.value, socket, tls, keys)

        def again() -> None:
            link.again(carrier.runs)
            carrier.wait(stop)

        with Wish("ended at once; the same command goes on") as wish:

            def stop() -> bool:
                return wish.number > 0

            try:
                print(f"waiting for clients at {_HOST.value}:{_PORT.value}", flush=True)
                carrier.wait(stop)
                deployment = Deployment(own, workdir, Post(carrier, again, stop))
                with closing(deployment):
                    status = train(config, workdir, stop=stop, way=deployment.way)
            except StoppedError:
                print("interrupted before the first round", flush=True)
                return 128 + wish.number
            finally:
                carrier.close()
                link.close()
        return _end(status, folder, wish.number)


def _end(status: str, folder: Path, number: int) -> int:
    if _REPORT.value:
        from experiments.report import write_report

        page = write_report([folder], folder / "report" / "index.html")
        print(f"{status} · report: {printable(page)}", flush=True)
    else:
        print(status, flush=True)
    if status == "interrupted":
        return 128 + (number or SIGTERM)
    return 1 if status == "diverged" else 0


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_cli(main)
