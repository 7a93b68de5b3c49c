"""Makes the certificate of ``serve --self-signed``, and keeps it in the user's cache."""

from __future__ import annotations

import ipaddress
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from blip2edge.bundle.outputs.locks import write_file
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import BackendError, OutputError
from blip2edge.packages import require

DAYS = 365
"""Validity of a certificate; browsers refuse server certificates of more than 398 days."""

RENEW_DAYS = 7
"""If the certificate in the cache expires in fewer days, a new certificate is made."""

LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class SelfSigned:
    """A certificate and its key.

    Attributes:
        certificate: File in PEM format.
        key: File in PEM format, which only its owner can read.
        fingerprint: SHA-256 of the certificate, as browsers show it.
        names: Host names and addresses that the certificate is valid for.
    """

    certificate: Path
    key: Path
    fingerprint: str
    names: tuple[str, ...]


def self_signed(*hosts: str) -> SelfSigned:
    """Returns the certificate in the cache if it is valid for the names of this machine, else makes a new one.

    Args:
        *hosts: Further names or addresses.

    Raises:
        BackendError: The package cryptography is not installed.
        OutputError: The cache cannot be written.
    """
    require("cryptography", "a certificate of --self-signed", BackendError)
    wanted = tuple(sorted({*LOCAL, *machine_names(), *(host.lower() for host in hosts if _is_name(host))}))
    try:
        folder = cache_directory() / "tls"
    except RuntimeError as error:
        raise OutputError("there is no home directory for the certificate", "set XDG_CACHE_HOME to a folder") from error
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    fingerprint = _usable(certificate, key, wanted)
    if fingerprint is None:
        made, secret = _make(wanted)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(key, secret, mode=0o600)
            write_file(certificate, made, mode=0o600)
        except OSError as error:
            raise OutputError(
                f"{folder}: the certificate cannot be written ({error.strerror or error})",
                "set XDG_CACHE_HOME to a folder that can be written, or give --tls-cert and --tls-key",
            ) from error
        fingerprint = _usable(certificate, key, wanted) or ""
    return SelfSigned(certificate, key, fingerprint, wanted)


def machine_names() -> set[str]:
    """Returns the host names of this machine and the addresses of its interfaces, without link-local addresses."""
    name = socket.gethostname().lower()
    names = {name, f"{name}.local"} if _is_name(name) else set()
    return names | _ipv4() | _ipv6()


def _is_name(host: str) -> bool:
    """Whether a certificate may name a host: an ASCII name, or an address other than ``0.0.0.0`` and ``::``."""
    with suppress(ValueError):
        return not ipaddress.ip_address(host).is_unspecified
    return 0 < len(host) <= 253 and host.isascii() and all(host.split("."))


def _ipv4() -> set[str]:
    import fcntl

    get_address, found = 0x8915, set()  # SIOCGIFADDR of Linux
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", name[:15].encode()))
                found.add(socket.inet_ntoa(answer[20:24]))
    return found


def _ipv6() -> set[str]:
    table = Path("/proc/net/if_inet6")
    if not table.exists():
        return set()
    addresses = (ipaddress.IPv6Address(bytes.fromhex(line.split()[0])) for line in table.read_text().splitlines())
    return {str(address) for address in addresses if not address.is_link_local}


def _usable(certificate: Path, key: Path, wanted: tuple[str, ...]) -> str | None:
    """Returns the fingerprint of a cached certificate; None if it lacks a name, expires soon, or cannot be read."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    try:
        read = x509.load_pem_x509_certificate(certificate.read_bytes())
        secret = serialization.load_pem_private_key(key.read_bytes(), None)
        names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, x509.ExtensionNotFound):
        return None
    held = {str(name.value) for name in names}
    ends = datetime.now(timezone.utc) + timedelta(days=RENEW_DAYS)
    if not held >= set(wanted) or read.not_valid_after_utc < ends or read.public_key() != secret.public_key():
        return None
    return ":".join(f"{byte:02X}" for byte in read.fingerprint(hashes.SHA256()))


def _make(names: tuple[str, ...]) -> tuple[bytes, bytes]:
    """Makes a certificate for the names; returns the certificate and its key, both in PEM format."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "blip2edge")])
    now, public = datetime.now(timezone.utc), key.public_key()
    usage: list[tuple[Any, bool]] = [
        (x509.SubjectAlternativeName([_general_name(name) for name in names]), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectKeyIdentifier.from_public_key(public), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False),
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=DAYS))
    )
    for extension, critical in usage:
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(key, hashes.SHA256())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), secret


def _general_name(name: str) -> Any:
    from cryptography import x509

    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)
