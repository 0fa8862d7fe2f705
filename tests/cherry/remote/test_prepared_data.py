"""Prepared data on its way through a real object store, and what hosts that share nothing must not be given."""

from __future__ import annotations

import shutil

import pytest

from base import storage
from base.errors import ConfigError, MissingFileError
from cherry.cluster import ClusterSpec, NodeSpec, SshConfig
from cherry.data.shards import TokenDataset, read_manifest
from cherry.remote.job import Job
from cherry.remote.prepared_data import check_apart, copy_committed, publish


def apart(*program) -> Job:
    ssh = SshConfig(runs_directory="/scratch/cherry")
    return Job(ClusterSpec(nodes=(NodeSpec(host="a"), NodeSpec(host="b")), ssh=ssh), 2, 1, ("train.py", *program))


def test_data_goes_through_a_store_to_another_host_once(prepared_data, s3, tmp_path):
    there = str(tmp_path / "host" / "data")
    assert copy_committed(str(prepared_data), f"{s3}/data")
    assert copy_committed(f"{s3}/data", there)
    assert not storage.damage(there)
    assert TokenDataset(there).manifest == read_manifest(str(prepared_data))
    assert not copy_committed(str(prepared_data), f"{s3}/data")
    assert not copy_committed(f"{s3}/data", there)


def test_a_copy_that_was_cut_or_is_damaged_is_made_again(prepared_data, s3, tmp_path):
    there = tmp_path / "data"
    copy_committed(str(prepared_data), f"{s3}/data")
    copy_committed(f"{s3}/data", str(there))
    for damage in (
        lambda: (there / "COMMITTED").unlink(),
        lambda: (there / "train-00000.bin").write_bytes(b""),
        lambda: (there / "tokenizer.json").unlink(),
    ):
        damage()
        assert copy_committed(f"{s3}/data", str(there))
        assert not storage.damage(str(there))


def test_what_is_not_finished_is_not_copied(s3, tmp_path):
    with pytest.raises(MissingFileError, match="holds no finished output"):
        copy_committed(f"{s3}/data", str(tmp_path / "data"))


def test_a_job_s_data_is_published_beside_its_checkpoints(job_config, prepared_data, s3, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(prepared_data, run / "data")
    job = apart(f"--config={job_config}", f"--run_dir={run}", "--set", f"checkpoint.directory={s3}/mini")
    place = publish(job)
    assert place.startswith(f"{s3}/mini/data-")
    assert storage.read_commit(place) == storage.read_commit(str(prepared_data))
    assert f"directory: {s3}/mini\n" in (run / "config.yaml").read_text(), "later steps read it"
    assert publish(job) == place
    assert capsys.readouterr().out.count("is copied to") == 1


def test_other_data_under_the_same_checkpoints_is_kept_apart(job_config, prepared_data, s3, tmp_path):
    flags = (f"--config={job_config}", "--set", f"checkpoint.directory={s3}/mini")
    shutil.copytree(prepared_data, tmp_path / "one" / "data")
    first = publish(apart(*flags, f"--run_dir={tmp_path / 'one'}"))
    text = tmp_path / "text"
    text.mkdir()
    for name in range(20):
        (text / f"{name}.txt").write_text("\n".join(f"other words {name} {number}" for number in range(200)))
    other = publish(apart(*flags, f"--run_dir={tmp_path / 'two'}", "--set", f"data.source={text}"))
    assert other != first
    assert storage.read_commit(first) == storage.read_commit(str(prepared_data)) and not storage.damage(first)


def test_data_is_prepared_first_where_nobody_did(job_config, prepared_data, s3, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for path in prepared_data.parent.glob("*.txt"):
        shutil.copy(path, text)
    places = ["--set", f"checkpoint.directory={s3}", "--set", f"data.source={text}"]
    place = publish(apart(f"--config={job_config}", f"--run_dir={tmp_path / 'run'}", *places))
    assert storage.read_json(f"{place}/manifest.json")["digest"] == read_manifest(str(prepared_data)).digest


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], r"checkpoint\.directory: must be a URI of an object store"),
        (["checkpoint.directory=/shared/c"], r"checkpoint\.directory: must be a URI .*'/shared/c'"),
        (["checkpoint.directory=s3://b/c", "init_from=weights"], r"init_from: must be a URI of an object store"),
    ],
)
def test_paths_that_hosts_would_not_have_are_refused(mini, overrides, told):
    with pytest.raises(ConfigError, match=rf"^c\.yaml: its hosts share no file system \(ssh\.runs_directory\).*{told}"):
        check_apart(mini(*overrides), "c.yaml")


def test_documents_may_be_anywhere_as_their_tokens_are_copied(mini):
    check_apart(mini("checkpoint.directory=s3://b/c", "data.source=/here/text"), "c.yaml")


@pytest.mark.parametrize("flags", [[], ["--run_dir=s3://b/run"]])
def test_there_must_be_a_directory_to_carry_files_to(job_config, flags):
    with pytest.raises(ConfigError, match="--run_dir must be a directory here"):
        publish(apart(f"--config={job_config}", *flags))
