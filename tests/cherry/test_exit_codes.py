"""What the launcher ends with when training cannot go on: a code of its own for each, and one clear text."""

import os
import socket
import subprocess

import pytest

pytestmark = pytest.mark.slow


def test_the_caller_s_mistakes(make_job, tmp_path):
    job = make_job("mistakes")
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    cases = {
        11: (["--batch_size=7", "--gradient_accumulation_steps=2"], "train.batch_size: must be divisible by"),
        12: ([f"--resume_from={tmp_path}/step_99"], "step_99 holds no finished checkpoint"),
        14: (["--model_path", str(tmp_path)], str(broken)),
        16: (
            ["--learning_rate=1e30"],
            "the 10 steps up to it were skipped (train.max_skipped_steps) after no rollback",
        ),
    }
    for code, (flags, text) in cases.items():
        ended = job.run(*flags)
        assert ended.returncode == code, f"{flags}: {ended.stdout}{ended.stderr}"
        assert text in ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr


@pytest.mark.parametrize(
    ("launcher", "flags", "text"),
    [
        ((), ["--batch=16"], "train.py: unrecognized arguments: --batch=16"),
        ((), ["--steps=many"], "train.py: argument --steps: invalid int value: 'many'"),
        (("--nnode=1",), [], "cherry-launch: "),
    ],
)
def test_a_flag_that_is_none_is_the_caller_s_mistake(make_job, launcher, flags, text):
    ended = make_job("flags").run(*flags, launcher=launcher)
    assert ended.returncode == 11, ended.stdout + ended.stderr
    assert f"error: {text}" in ended.stderr
    assert ended.stderr.count("error:") == 1, ended.stderr
    assert "Traceback" not in ended.stderr


def test_data_that_was_cut_off_is_named(make_job):
    job = make_job("cut")
    shard = job.directory / "data" / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    ended = job.run()
    assert ended.returncode == 13, ended.stdout + ended.stderr
    assert f"error: {shard}: {len(content) - 10} bytes, {len(content)} were written" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_corrupt_shard_is_named(make_job):
    job = make_job("corrupt")
    assert job.run("--steps=4", "--set", "checkpoint.every_steps=2").returncode == 0
    shard = job.checkpoint(4) / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    ended = job.run("--steps=6")
    assert ended.returncode == 15, ended.stdout + ended.stderr
    assert f"{shard}: other content" in ended.stderr


def test_a_taken_port_is_refused_before_anything_starts(make_job):
    job = make_job("port")
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ended = job.run(launcher=(f"--master_port={port}",))
    assert ended.returncode == 33, ended.stdout + ended.stderr
    assert f"port {port} is taken" in ended.stderr
    assert not (job.directory / "train").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_costs_a_save_and_is_told(make_job, tmp_path):
    job, small = make_job("full"), tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=True)
    try:
        ended = job.run("--set", f"checkpoint.directory={small}")
        assert ended.returncode == 32, ended.stdout + ended.stderr
        assert "no space left while writing" in ended.stderr
        assert len(job.losses) == 12, "training itself goes on"
        assert not [path for path in small.iterdir() if (path / "COMMITTED").exists()]
    finally:
        subprocess.run(["umount", str(small)], check=True)
