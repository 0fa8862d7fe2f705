"""Communication settings in a config, and the environment variables of NCCL and gloo that they set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from base.errors import ConfigError
from cherry.job_config import CommunicationConfig

ROOT = Path(__file__).resolve().parents[3]
# A rank that writes down what C libraries read from its environment, when it would connect.
LISTENING = """
import ctypes, json, os, sys
import torch.distributed as dist
from cherry import rank_main
def connect(backend, timeout):
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    names = [b"NCCL_BUFFSIZE", b"NCCL_MAX_NCHANNELS", b"NCCL_SOCKET_IFNAME", b"GLOO_SOCKET_IFNAME", b"NCCL_IB_TC"]
    read = {name.decode(): (getenv(name) or b"").decode() for name in names}
    with open(f"{sys.argv.pop()}-{os.environ['RANK']}.json", "w") as handle:
        json.dump({**read, "timeout_s": timeout.total_seconds()}, handle)
    os._exit(0)
dist.init_process_group = connect
rank_main.main(sys.argv[1:-1])
"""


@pytest.mark.parametrize(("size", "expected"), [("8MiB", 8 << 20), ("512KiB", 512 << 10), ("1GiB", 1 << 30), (77, 77)])
def test_a_buffer_s_size(size, expected):
    assert CommunicationConfig(buffer_size=size).variables() == {"NCCL_BUFFSIZE": str(expected)}


def test_invalid_settings_are_refused(mini):
    for wrong in ({"buffer_size": "8MB"}, {"buffer_size": 0}, {"environment": {"PATH": "/"}}, {"replicate": "int4"}):
        with pytest.raises(ValidationError):
            CommunicationConfig(**wrong)
    with pytest.raises(ConfigError, match=r"communication\.replicate: compresses between replicas"):
        mini("communication.replicate=int8")
    assert mini("communication.reduce_dtype=bf16").communication.variables() == {}


@pytest.mark.slow
def test_settings_reach_the_libraries_of_every_rank_unless_the_environment_has_them(job_config, tmp_path):
    (tmp_path / "listening.py").write_text(LISTENING)
    settings = {"buffer_size": "8MiB", "max_channels": 8, "interface": "lo", "timeout_s": 90.0}
    settings["environment"] = {"NCCL_IB_TC": "106"}
    flags = [flag for key, value in settings.items() for flag in ("--set", f"communication.{key}={json.dumps(value)}")]
    program = [str(tmp_path / "listening.py"), f"--config={job_config}", f"--run_dir={tmp_path}", *flags]
    command = [sys.executable, "-m", "cherry.launcher", "--nproc_per_node=2", *program, str(tmp_path / "read")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NCCL_MAX_NCHANNELS": "2"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    expected = {"NCCL_BUFFSIZE": "8388608", "NCCL_MAX_NCHANNELS": "2", "NCCL_IB_TC": "106", "timeout_s": 90.0}
    expected |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    for rank in range(2):
        assert json.loads((tmp_path / f"read-{rank}.json").read_text()) == expected
