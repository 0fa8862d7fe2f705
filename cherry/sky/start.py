"""Begin of a start of a SkyPilot job, called by its task on the first host.

python -P -m cherry.sky.start --directory=s3://bucket/tiny --starts=5

SkyPilot starts a job again without a limit after the exit codes of transient errors. A store that refuses every write
would be one, on hosts that are paid for: so starts without a new checkpoint in between are counted beside the
checkpoints, and the job ends when there are too many.
"""

from __future__ import annotations

import os
from typing import Any

from base import storage
from base.errors import ArgumentParser, ConfigError, InvalidInputError, MissingFileError, OperationalError, run_program
from cherry.checkpoint.naming import newest_checkpoint

STARTS_FILE = "starts.json"
"""File beside the checkpoints: the job, its newest checkpoint at its last start, and its starts since that came."""
TASK_VARIABLE = "SKYPILOT_TASK_ID"
"""SkyPilot's name of the job, the same in all its starts (sky/skylet/constants.py of 0.14.1)."""


def begin(directory: str, starts: int) -> None:
    """Count this start of the job.

    Args:
        directory: URI of the checkpoints.
        starts: starts without a new checkpoint in between that may be.

    Raises:
        InvalidInputError: it was started too often, or storage fails, so that nothing could be counted.
        ConfigError: no SkyPilot task calls this.
    """
    job = os.environ.get(TASK_VARIABLE)
    if job is None:
        raise ConfigError(f"{TASK_VARIABLE} is not set: this program is called by a SkyPilot task.")
    try:
        now = {"job": job, "newest": newest_checkpoint(directory)}
        before = _read(directory)
        same = {key: before.get(key) for key in now} == now and isinstance(before.get("starts"), int)
        count = before["starts"] + 1 if same else 1
        storage.write_json(storage.join(directory, STARTS_FILE), {**now, "starts": count})
    except OperationalError as error:
        # Its own exit code would start the job again, and again.
        raise InvalidInputError(
            f"the job's starts cannot be counted, so it ends: {error} Submit it again to resume."
        ) from error
    if count > starts:
        raise InvalidInputError(
            f"the job was started {starts} times (sky.starts) without a new checkpoint in {directory}. Look for the "
            "cause in its output (sky jobs logs), then submit it again to resume."
        )
    print(f"start {count} since {now['newest'] or 'the beginning'}", flush=True)


def _read(directory: str) -> dict[str, Any]:
    """The last start's record; empty where there is none, or what a lost host left of one."""
    try:
        record = storage.read_json(storage.join(directory, STARTS_FILE))
    except (MissingFileError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def main() -> None:
    """Count a start; exits with 0 if the job may begin."""
    parser = ArgumentParser(prog="cherry.sky.start", description="Count a start of a SkyPilot job.")
    parser.add_argument("--directory", required=True, help="URI of the checkpoints")
    parser.add_argument("--starts", type=int, required=True, help="most starts without a new checkpoint in between")
    options = parser.parse_args()
    begin(options.directory, options.starts)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
