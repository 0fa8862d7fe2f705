"""Timeout of collectives in every process group, also in those that device meshes and libraries make."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import distributed_c10d


def set_group_timeout(seconds: float) -> None:
    """Set torch's default timeout of process groups that are made from now on, the default group included.

    `init_process_group(timeout=...)` reaches its own group alone: `new_group` and `init_device_mesh` take these
    defaults, of which a device mesh has no argument.
    """
    timeout = timedelta(seconds=seconds)
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
