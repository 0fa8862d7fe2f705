"""The reaping flow: hosts that nobody gave back, because a process was killed or hung, are given back."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from base.errors import OperationalError
from tasks.clusters.give_back import reap
from tasks.run_logger import run_logger


@flow(name="reap-flow", flow_run_name="reap clusters", validate_parameters=True)
def reap_flow(runs_directory: str = "runs") -> list[str]:
    """Give back hosts that are overdue, or whose run no process works on; returns a sentence for each.

    Args:
        runs_directory: directory of the runs, as the deployments' configs name it.

    Raises:
        OperationalError: hosts could not be given back; the text names them. The next run tries again.
    """
    reaped = reap(Path(runs_directory))
    for line in reaped.done:
        run_logger().info(line)
    if reaped.failed:
        raise OperationalError("; ".join(reaped.failed))
    return reaped.done
