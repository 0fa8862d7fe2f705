"""Memory of one rank in a simulated training step: the real sharding on a fake process group and fake tensors.

    python -m benchmarks.simulated_step --ranks 256 --expert 64

The sharding is that of training (`cherry.distributed.fsdp`), tensors have shapes and no values, and torch's
FSDPMemTracker counts their bytes. The model is a slice of the 671B one. Expert parallel dispatch is balanced: every
rank sends every other as many rows as it gets. `fully_shard` runs outside of fake tensor mode, which is 20 times
faster, and a first step is not counted: it allocates the optimizer states.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from cherry.distributed import fsdp
from cherry.distributed.expert_parallel import AllToAllDispatcher, DispatchPlan
from cherry.job_config import ParallelConfig
from cherry.optim.build import build_optimizer
from cherry.train_config import TrainConfig
from cherry.training_model import TrainingModel, _wrap_blocks
from model.experts import Experts
from model.model_config import PRESETS, ModelConfig
from model.transformer import DeepseekV3


def slice_of_671b(dense: int = 1, mixtures: int = 3) -> ModelConfig:
    """The released widths in a few layers, with the MTP module."""
    layers = {"num_hidden_layers": dense + mixtures, "first_k_dense_replace": dense}
    return ModelConfig.model_validate({**PRESETS["671b"], **layers})


@dataclass(frozen=True)
class Held:
    """Bytes of one rank, the maximum of each kind in a step."""

    parameters: int
    gradients: int
    states: int
    unsharded: int
    """Unsharded (all-gathered) parameters in use."""
    all_gather: int
    reduce_scatter: int
    peak: int
    """Peak of all kinds together; on a CPU norms and experts make fp32 copies that a GPU's kernels do not."""


def simulate(
    config: ModelConfig, ranks: int, parallel: ParallelConfig, train: TrainConfig, sequences: int, length: int
) -> Held:
    """Bytes that rank 0 of `ranks` holds in a step over `sequences` of `length`."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with torch.device("meta"):
            model = DeepseekV3(config)
        network = TrainingModel(model, train.loss_chunk_tokens)
        if train.activation_checkpointing == "full":
            _wrap_blocks(model)
        meshes = fsdp.build_mesh(parallel, torch.device("cpu"))
        fsdp.shard_model(network, meshes, train.precision, parallel)
        with FakeTensorMode(allow_non_fake_inputs=True), _balanced():
            fsdp.materialize(network, torch.device("cpu"))
            network.train()
            optimizer = build_optimizer(model, train)
            tokens = torch.zeros(sequences, length, dtype=torch.int64)
            _step(network, optimizer, tokens)
            tracker = FSDPMemTracker(network, optimizer)
            tracker.track_inputs((tokens,))
            with tracker:
                _step(network, optimizer, tokens)
            return _largest(tracker)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # keyed by meshes that compare equal between ranks


def _largest(tracker: FSDPMemTracker) -> Held:
    found: Counter[str] = Counter()
    for module in tracker.memory_tracking.values():
        for snapshots in module.snapshots.values():
            for snapshot in snapshots:
                for kind, size in snapshot[torch.device("cpu")].items():
                    name = str(getattr(kind, "value", kind))
                    found[name] = max(found[name], size)
    kinds = ("Sharded Param", "Sharded Grad", "OptState", "Unsharded Param", "All Gather", "Reduce Scatter")
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return Held(*(found[kind] for kind in kinds), peak)


def _step(network: TrainingModel, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    loss, mtp_loss, balance = network(tokens, tokens)
    (loss + mtp_loss + balance).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def _balanced() -> Iterator[None]:
    """Replace code that reads tensor values: the dispatch plan, and the choice of the loop over experts on a CPU."""

    def plan(dispatcher: AllToAllDispatcher, counts_E: Tensor) -> DispatchPlan:
        ranks, rows = dispatcher.all_to_all.ranks, dispatcher.simulated_rows
        each = [rows // ranks] * ranks
        order = torch.arange(rows, device=counts_E.device)
        return DispatchPlan(each, each, order, order, counts_E.view(ranks, -1)[0].clone())

    call = AllToAllDispatcher.__call__

    def noting_rows(
        dispatcher: AllToAllDispatcher, experts: Experts, x_ND: Tensor, weight_NK: Tensor, *routed: Tensor
    ) -> Tensor:
        dispatcher.simulated_rows = weight_NK.numel()
        return call(dispatcher, experts, x_ND, weight_NK, *routed)

    with (
        mock.patch.object(AllToAllDispatcher, "plan", plan),
        mock.patch.object(AllToAllDispatcher, "__call__", noting_rows),
        mock.patch("model.experts.can_group", lambda *_: True),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--expert", type=int, default=64)
    options = parser.parse_args()
    train = TrainConfig(precision="bf16", activation_checkpointing="full")
    held = simulate(slice_of_671b(), options.ranks, ParallelConfig(expert=options.expert), train, 1, 4096)
    print(json.dumps(asdict(held)))


if __name__ == "__main__":
    main()
