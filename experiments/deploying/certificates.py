"""Makes certificates for trials: a private certificate authority, and a server that it signs."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from experiments.deploying.credentials import FILES
from flexmoe_jax.errors import InputError

_DAYS = 365
_PART = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_PART}(\.{_PART})*")


def make_certificates(folder: Path, host: str) -> None:
    """Writes ca.crt, server.pem and server.key into a folder; only their owner may read them.

    The authority's private key is not kept, so no second server can be made that clients trust.

    Args:
      folder: folder for the files; it is created if missing.
      host: name or address by which clients reach the server.

    Raises:
      InputError: there are such files, or the host can have no certificate.
    """
    names = _names(host)
    for name in FILES:
        if (folder / name).exists():
            remedy = "is there already, and clients may trust it: delete it, or name another folder"
            raise InputError("--make_certificates", folder / name, remedy)
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "flexmoe_jax authority")])
    authority = (
        _begin(issuer, issuer, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "flexmoe_jax server")])
    server = (
        _begin(subject, issuer, server_key)
        .add_extension(x509.SubjectAlternativeName(dict.fromkeys(names)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    private = server_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = (one.public_bytes(serialization.Encoding.PEM) for one in (authority, server))
    for name, content in zip(FILES, (*public, private), strict=True):
        _write(folder / name, content)


def _names(host: str) -> list[x509.GeneralName]:
    """Returns what the server may be called: `host`, or this machine."""
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    names += [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        return [*names, x509.IPAddress(ipaddress.ip_address(host))]
    except ValueError:
        pass
    # In certificates, names are as in the DNS: xn--bcher-kva.example for bücher.example.
    if not _HOST_NAME.fullmatch(host):
        remedy = "give a host's name of letters, digits, - and dots, or an address, as 192.0.2.7"
        raise InputError("--host", host, remedy)
    return [*names, x509.DNSName(host)]


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _write(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
