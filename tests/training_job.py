"""Tiny training jobs, started as a person would: by the launcher, in a subprocess."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """\
name: mini
model: {{preset: tiny, vocab_size: 600, hidden_size: 32, intermediate_size: 64, moe_intermediate_size: 16,
        num_hidden_layers: 2, q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 16, qk_rope_head_dim: 8,
        v_head_dim: 16}}
data: {{source: "{source}", sequence_length: 32, heldout_fraction: 0.2}}
train: {{steps: 12, batch_size: 8, warmup_steps: 2, learning_rate: 3.0e-3}}
checkpoint: {{every_steps: 4}}
"""


def prepare_documents(root: Path) -> Path:
    """Directory of the token shards of 60 small documents, which it writes to `root`."""
    from cherry.data.prepare import prepare
    from cherry.job_config import DataConfig

    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for number in range(60):
        lines = [" ".join(words[(number * 7 + line * k) % 8] for k in range(1, 9)) for line in range(12)]
        (root / f"{number:02d}.txt").write_text("\n".join(lines))
    config = DataConfig(source=str(root), sequence_length=32, heldout_fraction=0.2)
    prepare(config, vocab_size=600, directory=str(root / "data"))
    return root / "data"


def write_config(path: Path, prepared: Path) -> Path:
    """Config of a job on prepared data that takes a second to train: every part of the architecture, two layers."""
    path.write_text(CONFIG.format(source=prepared.parent))
    return path


class Job:
    """A training job in a directory of its own."""

    def __init__(self, directory: Path, config: Path, prepared: Path) -> None:
        self.directory = directory
        self.config = config
        directory.mkdir(parents=True)
        shutil.copytree(prepared, directory / "data")

    def command(self, *flags: str, ranks: int = 1, launcher: tuple[str, ...] = ()) -> list[str]:
        """What to run; `flags` are train.py's, `launcher` the launcher's own."""
        start = [sys.executable, "-m", "cherry.launcher", f"--nproc_per_node={ranks}", *launcher, "train.py"]
        return [*start, "--config", str(self.config), "--run_dir", str(self.directory), *flags]

    def start(self, *flags: str, ranks: int = 1) -> subprocess.Popen[str]:
        """Start it and return at once."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(
            self.command(*flags, ranks=ranks), text=True, cwd=ROOT, env=environment_of_programs(), **pipes
        )

    def run(self, *flags: str, ranks: int = 1, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        command = self.command(*flags, ranks=ranks, launcher=launcher)
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment_of_programs(), check=False
        )

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics stream so far."""
        path = self.directory / "train" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [line["loss"] for line in self.metrics]

    def checkpoint(self, step: int) -> Path:
        """Directory of one step's checkpoint."""
        return self.directory / "train" / "checkpoints" / f"step_{step}"


def environment_of_programs() -> dict[str, str]:
    """What programs of tests see: this checkout first, one thread each."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
