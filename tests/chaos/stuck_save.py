"""train.py with a save that never ends: at one step every rank stops at a known place, and says so by a file."""

import os
import sys
import threading
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter

import cherry.trainer
from cherry import rank_main
from cherry.checkpoint.checkpointer import Checkpointer
from cherry.checkpoint.naming import step_name

PLACE, STEP, SIGN = os.environ["STUCK_PLACE"], int(os.environ["STUCK_STEP"]), Path(os.environ["STUCK_SIGN"])


def stop():
    Path(f"{SIGN}-{os.environ['RANK']}").touch()
    threading.Event().wait()


class StuckWriter(FileSystemWriter):
    """Stops when half of its file is on the disk."""

    def write_data(self, plan, planner):
        super().write_data(plan, planner).wait()
        (own,) = Path(self.path).glob(f"__{os.environ['RANK']}_*.distcp")
        os.truncate(own, own.stat().st_size // 2)
        stop()


class StuckCheckpointer(Checkpointer):
    """Stops while it writes, or just before the marker."""

    def _writer(self, target):
        stuck = PLACE == "write" and target.endswith(step_name(STEP))
        return StuckWriter(target) if stuck else super()._writer(target)

    def _commit(self, where, record, files):
        if PLACE == "commit" and record["step"] == STEP:
            stop()
        super()._commit(where, record, files)


if __name__ == "__main__":
    cherry.trainer.Checkpointer = StuckCheckpointer
    rank_main.main(sys.argv[1:])
