"""Real certificates for the tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from expertmesh.routing.transport import TlsSettings

_PEM = serialization.Encoding.PEM


class Authority:
    """A certificate authority. Those of one name have different keys, and tell each other apart by key identifiers."""

    def __init__(self, name: str = "mesh CA") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = self._builder(self._name, self._key.public_key(), timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.pem = builder.add_extension(usage, critical=True).sign(self._key, hashes.SHA256()).public_bytes(_PEM)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, life: timedelta) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        begin = now - timedelta(days=2)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(now + life)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def leaf(
        self, *, life: timedelta = timedelta(days=1), usage: x509.ObjectIdentifier | None = None
    ) -> tuple[bytes, bytes]:
        """(certificate, key), PEM. life: negative: it is over."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a member")])
        builder = self._builder(subject, key.public_key(), life)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        plain = serialization.NoEncryption()
        private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, plain)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(_PEM), private


SERVER_ONLY = ExtendedKeyUsageOID.SERVER_AUTH


def settings_in(folder: Path, renew_after_s: float = 3600.0) -> TlsSettings:
    """Where `write` puts its files."""
    names = ("cert.pem", "key.pem", "ca.pem")
    return TlsSettings(*(str(folder / name) for name in names), renew_after_s=renew_after_s)


def write(folder: Path, signer: Authority, *trusted: Authority, **leaf: object) -> TlsSettings:
    """A member's files: a new certificate by `signer`, and whom it trusts (the signer unless given).

    Files that are there are replaced, each in one step, the key first, as a careful administrator would.
    """
    certificate, key = signer.leaf(**leaf)  # type: ignore[arg-type]
    authorities = b"".join(authority.pem for authority in trusted or (signer,))
    folder.mkdir(exist_ok=True)
    for name, data in (("key.pem", key), ("cert.pem", certificate), ("ca.pem", authorities)):
        replace(folder / name, data)
    return settings_in(folder)


def replace(path: Path, data: bytes) -> None:
    """Another file in the place of one, closed to others."""
    draft = path.with_suffix(".new")
    draft.write_bytes(data)
    draft.chmod(0o600)
    draft.replace(path)
