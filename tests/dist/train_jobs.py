"""Trains jobs one after the other in the same processes, each on as many ranks as it asks for: one start for many runs.

python train_jobs.py FOLDER RANK, where FOLDER/jobs.json lists [config, run directory, ranks, overrides, programs...].
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from base.config import dump, load
from cherry.config import JobConfig
from cherry.trainer import Trainer


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        if rank >= job["ranks"]:
            continue
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]))
        store = dist.FileStore(str(folder / f"store-{number}"), job["ranks"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job["ranks"])
        overrides = [*job["set"], f"launch.nproc_per_node={job['ranks']}"]
        config = load(job["config"], JobConfig, overrides)
        if rank == 0:
            (Path(job["directory"]) / "config.yaml").write_text(dump(config))
        Trainer(config, job["directory"]).run()
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
