"""Certificates for tests: an authority, and what it signs."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pagewire.kv_transfer.tls import TlsFiles

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, directory: Path, name: str) -> tuple[str, str]:
        """The files of certificate and key."""
        cert, key = directory / f"{name}.pem", directory / f"{name}.key"
        cert.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        key.write_bytes(_pem(self.key, serialization.NoEncryption()))
        return str(cert), str(key)


class Authority:
    """Signs certificates of workers."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._name = name
        self._own = _sign(name, None, expires_in=_DAY)
        self.ca, _ = self._own.write(directory, name)

    def worker(self, name: str, *, expires_in: datetime.timedelta = _DAY) -> TlsFiles:
        """Files for one worker; with a negative `expires_in` the certificate is out of date."""
        signed = _sign(name, self._own, expires_in=expires_in)
        cert, key = signed.write(self._directory, f"{self._name}-{name}")
        return TlsFiles(cert=cert, key=key, ca=self.ca)

    def encrypted_key(self, name: str) -> TlsFiles:
        """As `worker`, but the key asks for a password."""
        signed = _sign(name, self._own, expires_in=_DAY)
        cert, key = signed.write(self._directory, f"{self._name}-{name}")
        password = serialization.BestAvailableEncryption(b"secret")
        Path(key).write_bytes(_pem(signed.key, password))
        return TlsFiles(cert=cert, key=key, ca=self.ca)


def _sign(name: str, issuer: Signed | None, *, expires_in: datetime.timedelta) -> Signed:
    """A certificate of `issuer`, or its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 10 * _DAY)
        .not_valid_after(now + expires_in)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(key if issuer is None else issuer.key, hashes.SHA256())
    )
    return Signed(certificate=certificate, key=key)


def _pem(
    key: ec.EllipticCurvePrivateKey, encryption: serialization.KeySerializationEncryption
) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
