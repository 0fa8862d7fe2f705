"""Trains jobs one after the other in the same processes, each on as many ranks as it asks for: one start for many runs.

python train_jobs.py FOLDER RANK, where FOLDER/jobs.json lists {config, directory, ranks, set, resume_from, largest}.
A job that resumes first saves what it read, so that it can be compared with what it was given. With `largest`, rank R
writes the size of the largest tensor that building the model made to largest-R.json.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from base.config import dump, load
from cherry.job_config import JobConfig
from cherry.trainer import Trainer
from cherry.training_model import Network, build


class Largest(TorchDispatchMode):
    """The most elements that one real tensor of this process has had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            own = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(own, torch.Tensor) and own.device.type != "meta":
                elements = own.untyped_storage().nbytes() // own.element_size()
                self.elements = max(self.elements, elements)
        return out


@contextmanager
def recording(directory: Path) -> Iterator[None]:
    """Writes down the largest tensor of building a model."""

    def recorded(config: JobConfig, device: torch.device, say: Any = None) -> Network:
        with Largest() as largest:
            network = build(config, device, say)
        held = max(parameter.to_local().numel() for parameter in network.model.parameters())
        found = {"made": largest.elements, "held": held}
        (directory / f"largest-{dist.get_rank()}.json").write_text(json.dumps(found))
        return network

    # Of the initial values a row at a time: this model's parameters are all below a chunk.
    with patch("model.transformer._INIT_CHUNK_ELEMENTS", 1), patch("cherry.trainer.build", recorded):
        yield


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        if rank >= job["ranks"]:
            continue
        ranks, here = job["ranks"], job["directory"]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank), WORLD_SIZE=str(ranks))
        store = dist.FileStore(str(folder / f"store-{number}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        config = load(job["config"], JobConfig, [*job["set"], f"launch.nproc_per_node={ranks}"])
        if rank == 0:
            Path(here, "config.yaml").write_text(dump(config))
        with recording(Path(here)) if job["largest"] else nullcontext():
            trainer = Trainer(config, here, resume_from=job["resume_from"])
        if job["resume_from"] is not None:
            trainer._save()
        trainer.run()
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds meshes, whose groups are gone
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # as cherry/rank_main.py does
