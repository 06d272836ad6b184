"""Keeping secrets out of the configuration, and getting the cluster's one from where it belongs."""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from expertmesh.platform.config.mesh import MeshConfig

SECRET_ENV = "EXPERTMESH_SECRET"
MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 4096

_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_SECRET_WORDS = frozenset(
    ("secret", "secrets", "password", "passwords", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey")
)
_KEY_KINDS = frozenset({"api", "access", "auth", "private", "signing", "encryption"})
# Tokens of a vocabulary, as in hf_overrides and tokenizer settings.
_TEXT_TOKENS = frozenset(("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio"))


def looks_like_secret(key: str) -> bool:
    """Whether a key's name says that its value is a secret: `password`, `apiKey`, `hf_token`; not `tokenizer`."""
    words = [word.lower() for word in _WORD.findall(key)]
    if not words:
        return False
    if _SECRET_WORDS.intersection(words):
        return True
    before = words[-2] if len(words) > 1 else ""
    return (words[-1] == "token" and before not in _TEXT_TOKENS) or (words[-1] == "key" and before in _KEY_KINDS)


def cluster_secret(config: MeshConfig, create_in: Path | None = None) -> bytes:
    """The secret that the members of one mesh authenticate each other with: 16 to 4096 bytes.

    Read from `routing.secret_file`, else from $EXPERTMESH_SECRET, else from `create_in/secret`, which is made with 32
    random bytes in hexadecimal if it isn't there; processes that race to make it all get the same one. Line ends after
    the secret don't count. Raises ConfigError, which never holds the secret, if there is none, it is too short or too
    long, or other users of the machine may open its file.
    """
    if config.routing.secret_file is not None:
        return _read(config.routing.secret_file, "routing.secret_file")
    value = os.environ.get(SECRET_ENV)
    if value is not None:
        return _checked(os.fsencode(value), SECRET_ENV)
    if create_in is None:
        raise ConfigError(
            f"no cluster secret: name a file in routing.secret_file, or set {SECRET_ENV} "
            f"(at least {MIN_SECRET_BYTES} bytes)"
        )
    path = create_in / "secret"
    try:
        if not path.exists():
            _create(path)
    except OSError as error:
        raise ConfigError(f"cluster secret: can't make {path}: {error.strerror}") from None
    return _read(path, "cluster secret")


def _checked(raw: bytes, origin: str) -> bytes:
    value = raw.rstrip(b"\r\n")
    if not MIN_SECRET_BYTES <= len(value) <= MAX_SECRET_BYTES:
        allowed = f"{MIN_SECRET_BYTES} to {MAX_SECRET_BYTES}"
        size = f"more than {MAX_SECRET_BYTES}" if len(value) > MAX_SECRET_BYTES else str(len(value))
        raise ConfigError(f"{origin}: the secret has {size} bytes; allowed: {allowed}")
    return value


def _read(path: Path, origin: str) -> bytes:
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer before we can see that it is one.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{origin}: can't read {path}: {reason}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{origin}: {path} is not a regular file")
        # The group may read: that is how Kubernetes mounts a secret for a pod that doesn't run as root.
        if mode & stat.S_IRWXO:
            raise ConfigError(
                f"{origin}: {path} is open to every user (mode {stat.S_IMODE(mode):04o}); mend: chmod 600 {path}"
            )
        return _checked(os.read(descriptor, MAX_SECRET_BYTES + 3), f"{origin}: {path}")
    finally:
        os.close(descriptor)


def _create(path: Path) -> None:
    """Make the file with all its bytes in one step; if another process was first, leave its file alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".secret-")  # O_EXCL, 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode() + b"\n")
            file.flush()
            os.fsync(descriptor)
        # A link fails where a rename would replace the winner's secret.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        Path(draft).unlink()
