"""FSDP sharding of the released model over thousands of fake ranks: the shard that one rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from cherry.distributed import fsdp
from cherry.distributed.local_part import local_part
from cherry.job_config import ParallelConfig
from cherry.training_model import TrainingModel
from model.model_config import PRESETS, ModelConfig
from model.transformer import DeepseekV3


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group of so many ranks, of which this process is the last."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param - 1, world_size=request.param)
    yield request.param
    dist.destroy_process_group()
    _clear_sharding_prop_cache()  # keyed by meshes that compare equal between ranks


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (256, ParallelConfig(expert=64)),
        (2048, ParallelConfig(expert=64)),
        (2048, ParallelConfig(replicate=2, expert=32, context=4)),
        (512, ParallelConfig()),  # more ranks than experts, and no axis for them
    ],
    indirect=["ranks"],
)
def test_no_rank_of_a_large_cluster_holds_more_than_its_share(ranks: int, parallel: ParallelConfig) -> None:
    config = ModelConfig.model_validate({**PRESETS["671b"], "num_hidden_layers": 4, "num_nextn_predict_layers": 0})
    with torch.device("meta"):
        model = DeepseekV3(config)
    network = TrainingModel(model, loss_chunk_tokens=1024)
    meshes = fsdp.build_mesh(parallel, torch.device("cpu"))
    fsdp.shard_model(network, meshes, "bf16", parallel)
    share = ranks // parallel.replicate
    for name, parameter in model.named_parameters():
        held, box = local_part(parameter)
        assert math.prod(stop - start for start, stop in box) == held.numel(), name
        if ".experts." in name:
            assert held.numel() * share == parameter.numel(), name
            assert box[0][1] == config.n_routed_experts, name  # the last rank has the last experts
        else:
            assert held.numel() <= math.ceil(parameter.shape[0] / share) * math.prod(parameter.shape[1:]), name
