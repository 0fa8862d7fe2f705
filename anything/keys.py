"""API keys: creation, storage as hashes, and lookup.

A key has 256 bits of randomness, so one round of SHA-256 is enough to store it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from dataclasses import dataclass, replace

from base.errors import AuthenticationError, ConfigError, MissingFileError, storage_errors

KEY_ENVIRONMENT = "ANYTHING_API_KEY"
_PREFIX = "any-"
_MODE = 0o600


@dataclass(frozen=True)
class KeyRecord:
    """Stored record of one key."""

    key_id: str
    sha256: str
    created: float
    """Unix seconds."""
    revoked: bool = False


class KeyStore:
    """Lookup of keys. It has hashes only, so nothing secret can reach a log through it."""

    def __init__(self, records: list[KeyRecord]) -> None:
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    def find(self, key: str) -> KeyRecord:
        """Record of `key`. Every record is compared, in constant time.

        Raises:
            AuthenticationError: no record matches this key.
        """
        presented = _hash(key)
        found: KeyRecord | None = None
        for record in self._records:
            if hmac.compare_digest(record.sha256, presented):
                found = record
        if found is None:
            raise AuthenticationError(
                "the bearer token is not a key of this server. Make one with `anything key create`."
            )
        return found


def load_keys(path: str | None, environment_key: str | None = None) -> KeyStore:
    """Keys of a file and the key from the environment.

    Raises:
        ConfigError: the file is malformed or others may read it, or there is no key at all.
        MissingFileError: `path` does not exist.
    """
    records = _read(path) if path is not None else []
    if environment_key:
        records.append(KeyRecord("environment", _hash(environment_key), created=0.0))
    if not records:
        raise ConfigError(
            f"a server needs at least one API key and got none. Make one with `anything key create --key_file F` and "
            f"serve with --key_file F, or set {KEY_ENVIRONMENT}."
        )
    return KeyStore(records)


def create_key(path: str) -> str:
    """New key, whose hash is added to the file (created with mode 0600); it cannot be read back later."""
    key = _PREFIX + secrets.token_urlsafe(32)
    records = _read(path) if os.path.exists(path) else []
    records.append(KeyRecord(secrets.token_hex(4), _hash(key), created=time.time()))
    _write(path, records)
    return key


def revoke_key(path: str, key_id: str) -> None:
    """Mark a key as revoked: a server started afterwards answers it with 403.

    Raises:
        ConfigError: the file has no key with this id.
    """
    records = _read(path)
    if key_id not in {record.key_id for record in records}:
        known = ", ".join(record.key_id for record in records) or "none"
        raise ConfigError(f"{path} has no key with the id {key_id!r}. It has: {known}.")
    _write(path, [replace(record, revoked=record.revoked or record.key_id == key_id) for record in records])


def list_keys(path: str) -> list[KeyRecord]:
    """Records of a key file; see `load_keys` for errors."""
    return _read(path)


def read_key_file(path: str) -> str:
    """Plain key on the first line of a client's key file.

    Raises:
        MissingFileError: no file at `path`.
        ConfigError: the file is empty.
    """
    with storage_errors(path), open(path, encoding="utf-8", errors="replace") as handle:
        key = handle.readline().strip()
    if not key:
        raise ConfigError(f"{path} is empty; it must hold an API key on its first line.")
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _read(path: str) -> list[KeyRecord]:
    if not os.path.exists(path):
        raise MissingFileError(f"no key file at {path}. Make one with `anything key create --key_file {path}`.")
    with storage_errors(path), open(path, encoding="utf-8", errors="replace") as handle:
        mode = os.fstat(handle.fileno()).st_mode & 0o777
        text = handle.read()
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:03o}). Run: chmod 600 {path}")
    try:
        records = [KeyRecord(**entry) for entry in json.loads(text)["keys"]]
        if not all(isinstance(record.key_id, str) and isinstance(record.sha256, str) for record in records):
            raise TypeError("an id and a hash are text")
        return records
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a key file (a JSON object with `keys`). Make one with `anything key create --key_file F`."
        ) from error


def _write(path: str, records: list[KeyRecord]) -> None:
    # Not base.storage.write_bytes: the temporary file must never be readable by others, not even for a moment.
    entries = [vars(record) for record in records]
    directory = os.path.dirname(os.path.abspath(path))
    temporary = f"{path}.{os.getpid()}.tmp"
    with storage_errors(path):
        os.makedirs(directory, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                json.dump({"keys": entries}, handle, indent=2)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
