"""What training's tests share: a process group of this process alone, and jobs without a launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from base.config import load
from cherry.job_config import JobConfig
from tests.cherry.releases import release


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


@pytest.fixture
def mini(job_config: Path) -> Callable[..., JobConfig]:
    """The tiny job's config with dotted overrides."""
    return lambda *overrides: load(job_config, JobConfig, overrides)


@pytest.fixture
def released_weights(mini, tmp_path, prepared_data):
    """A released model: its folder, and the tensors that it holds."""
    folder = tmp_path / "released"
    return folder, release(mini().model, folder, prepared_data)
