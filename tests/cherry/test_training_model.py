"""Which precisions a model is refused in: before anything of it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from base.errors import ConfigError
from cherry.job_config import JobConfig
from cherry.training_model import build

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group of so many ranks, of which this process is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()
    _clear_sharding_prop_cache()  # keyed by meshes that compare equal between ranks


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_precision_that_cannot_help_is_refused(precision: str, ranks: int, mini: Callable[..., JobConfig]) -> None:
    job = mini(f"train.precision={precision}")
    if ranks == 1:
        refusal = rf"train\.precision {precision} needs a GPU or several ranks .* Use fp32"
        with pytest.raises(ConfigError, match=refusal):
            build(job, CPU)
    elif precision == "fp8":
        with pytest.raises(ConfigError, match=r"train\.precision fp8: no matmul of this model is 128 wide"):
            build(job, CPU)
    else:
        assert build(job, CPU).resident is None
