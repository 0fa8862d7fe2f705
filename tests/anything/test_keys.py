"""API keys: a file of hashes for its owner only, and files that are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anything.keys import KeyStore, create_key, list_keys, load_keys, read_key_file
from base.errors import AuthenticationError, ConfigError, MissingFileError


def test_a_key_file_holds_a_hash_for_its_owner_only(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "keys.json")
    key, other = create_key(path), create_key(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert key != other
    assert key not in Path(path).read_text()
    keys = load_keys(path)
    assert len(keys) == 2
    assert keys.find(key).key_id == list_keys(path)[0].key_id
    with pytest.raises(AuthenticationError):
        keys.find(key[:-1])
    assert list(tmp_path.joinpath("deep").iterdir()) == [Path(path)]
    assert key not in repr(keys) + repr(keys.find(key))


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    create_key(str(path))
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_keys(str(path))


def test_wrong_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(MissingFileError, match="anything key create"):
        load_keys(str(path))
    path.touch(mode=0o600)
    for content in ("", "[]", '{"keys": [{"id": 1}]}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match="is not a key file"):
            load_keys(str(path))
    with pytest.raises(ConfigError, match="at least one API key"):
        load_keys(None)
    assert isinstance(load_keys(None, "from-the-environment"), KeyStore)
    with pytest.raises(ConfigError, match="is empty"):
        read_key_file(os.devnull)
