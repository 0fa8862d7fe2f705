"""Data that is prepared without training: the run directory is one that training and the export take."""

from __future__ import annotations

import pytest

from base import storage
from base.config import load
from base.errors import ConfigError
from cherry.data.shards import read_manifest
from cherry.job_config import JobConfig
from cherry.sky import prepare


def call(monkeypatch, config, directory, *changes):
    flags = [word for change in changes for word in ("--set", change)]
    monkeypatch.setattr("sys.argv", ["prepare", "--config", str(config), "--run_dir", str(directory), *flags])
    prepare.main()


def test_a_run_directory_gets_its_data_and_config_once(job_config, prepared_data, text, tmp_path, monkeypatch):
    stored = "checkpoint.directory=s3://bucket/mini"
    call(monkeypatch, job_config, tmp_path, text, stored)
    made, known = read_manifest(str(tmp_path / "data")), read_manifest(str(prepared_data))
    assert (made.digest, made.tokens) == (known.digest, known.tokens)
    assert load(tmp_path / "config.yaml", JobConfig) == load(job_config, JobConfig, [text, stored])
    before = storage.read_commit(str(tmp_path / "data"))
    call(monkeypatch, job_config, tmp_path, text)
    assert storage.read_commit(str(tmp_path / "data")) == before


def test_data_of_another_configuration_is_not_taken(job_config, text, tmp_path, monkeypatch):
    call(monkeypatch, job_config, tmp_path, text)
    with pytest.raises(ConfigError, match=r"was prepared with another configuration[\s\S]*data\.sequence_length"):
        call(monkeypatch, job_config, tmp_path, text, "data.sequence_length=16")
