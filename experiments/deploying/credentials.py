"""Checks certificates and keys before Flower gets them, which would try bad ones again for ever."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flexmoe_jax.errors import InputError

FILES = ("ca.crt", "server.pem", "server.key")


class Tls(NamedTuple):
    """Paths of a server's certificates.

    Attributes:
      authority: the certificate that clients trust.
      certificate: certificate of the server.
      key: private key of the server.
    """

    authority: Path
    certificate: Path
    key: Path


def read_tls(folder: Path, host: str) -> Tls:
    """Returns the certificates in a folder.

    Args:
      folder: folder with ca.crt, server.pem and server.key.
      host: name or address by which clients reach the server.

    Raises:
      InputError: a file is missing or not what its name says, or clients would refuse the server.
    """
    found = Tls(*(folder / name for name in FILES))
    for path in found:
        if not path.is_file():
            remedy = "make one with python -m experiments.serve --make_certificates=DIR"
            raise InputError("--certificates", path, remedy)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a function that gives a password, an encrypted key would ask the terminal for one.
        server.load_cert_chain(found.certificate, found.key, password=lambda: "")
    except (OSError, ValueError) as error:
        remedy = f"does not go with {found.key.name}, or is no certificate: {_reason(error)}"
        raise InputError("--certificates", found.certificate, remedy) from error
    client = _trusting("--certificates", found.authority)
    try:
        _shake_hands(client, server, host)
    except (ssl.SSLError, ValueError) as error:
        remedy = f"clients that trust {found.authority.name} refuse {host} by it: {_reason(error)}"
        raise InputError("--certificates", found.certificate, remedy) from error
    return found


def read_root(path: Path) -> Path:
    """Returns the path of a certificate that a client trusts.

    Raises:
      InputError: the file is no certificate.
    """
    _trusting("--certificate", path)
    return path


def read_public_keys(folder: Path) -> list[Path]:
    """Returns the paths of the public keys in a folder.

    Raises:
      InputError: there are none, or one is not a key that Flower takes.
    """
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    found = sorted(folder.glob("*.pub"))
    if not found:
        remedy = "holds no *.pub; each client makes its pair: ssh-keygen -t ecdsa -b 384 -f NAME"
        raise InputError("--client_keys", folder, remedy)
    for path in found:
        _check_key("--client_keys", path, load_ssh_public_key)
    return [path.resolve() for path in found]


def read_private_key(path: Path) -> Path:
    """Returns the path of a client's private key.

    Raises:
      InputError: it is not a key that Flower takes.
    """
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    _check_key("--key", path, lambda content: load_ssh_private_key(content, None))
    return path


def _check_key(flag: str, path: Path, load: Callable[[bytes], object]) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    make = "make a pair with ssh-keygen -t ecdsa -b 384 -N '' -f NAME"
    try:
        key = load(path.read_bytes())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(flag, path, f"is no such key ({_reason(error)}); {make}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        raise InputError(flag, path, f"is not of type ecdsa; {make}")


def _trusting(flag: str, authority: Path) -> ssl.SSLContext:
    """Returns the side of a client that trusts only this authority."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        client.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        raise InputError(flag, authority, f"is no certificate: {_reason(error)}") from error
    return client


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> None:
    """Lets both sides agree in memory, as they will over the network.

    Raises:
      ssl.SSLError: the client does not trust the server.
    """
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(down, up, server_hostname=host),
        server.wrap_bio(up, down, server_side=True),
    ]
    while sides:
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                continue


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return str(error)
