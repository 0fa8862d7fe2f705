"""Injects faults at random moments of real jobs, and prints one row for each kind of fault.

    python -m benchmarks.chaos [--share F] [--seed N] [--only ssh saves ...] [--output FILE]

Every job goes on from its newest committed checkpoint until it has ended. Its losses are then compared, bit for bit,
with those of a job that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from base.errors import MissingFileError
from benchmarks.chaos import (
    flow_faults,
    save_faults,
    service_faults,
    slurm_faults,
    ssh_faults,
    storage_faults,
    twice_faults,
)
from benchmarks.chaos.campaign import FLAGS, Campaign
from benchmarks.chaos.local import CONSTANT, RANKS, LocalCampaign
from benchmarks.chaos.record import Fault, rows, table
from tests import slurm
from tests.project import running_project
from tests.training_job import Job, prepare_documents, write_config
from tests.watcher import watch_this_process


@dataclass
class Chaos:
    """What the campaigns of a suite share: a folder, prepared data, and chance."""

    folder: Path
    share: float
    """Of the faults that the whole suite has."""
    choose: random.Random
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._prepared = prepare_documents(self.folder)
        self._config = write_config(self.folder / "mini.yaml", self._prepared)

    def job(self, name: str) -> Job:
        return Job(self.folder / name, self._config, self._prepared)

    def kinds(self, every: Sequence[str], whole: int) -> list[str]:
        """Each kind so often, in any order."""
        kinds = list(every) * self.count(whole)
        self.choose.shuffle(kinds)
        return kinds

    def count(self, whole: int) -> int:
        return max(1, round(whole * self.share))

    def meet(self, campaign: Campaign | LocalCampaign, kinds: list[str], ranks: int, *flags: str) -> None:
        """Have a job meet faults; its losses shall be those of an unbroken job with the same flags."""
        try:
            losses = campaign.run(kinds)
        finally:
            campaign.close()
        unbroken = self.job(f"unbroken-{len(self.faults)}")
        ended = unbroken.run(f"--steps={len(losses)}", *CONSTANT, *flags, ranks=ranks)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        for one in campaign.faults:
            one.losses_equal = unbroken.losses == losses
        self.faults += campaign.faults


def over_ssh(chaos: Chaos) -> None:
    """Jobs on two hosts with a spare, then on three with a spare."""
    for nodes in (2, 3):
        with ssh_faults.hosts_of(nodes + 1) as lab:
            campaign = ssh_faults.SshCampaign(chaos.job(f"ssh-{nodes}"), lab, nodes, chaos.choose)
            chaos.meet(campaign, chaos.kinds(ssh_faults.KINDS, 3), nodes, *FLAGS)


def under_slurm(chaos: Chaos) -> None:
    """A job on two of three nodes."""
    if (reason := slurm.missing()) is not None:
        raise MissingFileError(reason)
    with contextmanager(slurm.slurm_lab)(chaos.folder / "slurm", 3) as lab:
        campaign = slurm_faults.SlurmCampaign(chaos.job("queued"), lab, 2, chaos.choose)
        chaos.meet(campaign, chaos.kinds(slurm_faults.KINDS, 3), 2, *FLAGS)


def twice(chaos: Chaos) -> None:
    """A job that is started a second time while it trains, on one host and on two."""
    with ssh_faults.hosts_of(2) as lab:
        campaign = twice_faults.TwiceCampaign(chaos.job("twice"), lab, chaos.choose)
        chaos.meet(campaign, chaos.kinds(twice_faults.KINDS, 5), RANKS)


def saves(chaos: Chaos) -> None:
    """A job of two ranks that saves all the time."""
    campaign = save_faults.SaveCampaign(chaos.job("saves"), chaos.choose)
    chaos.meet(campaign, chaos.kinds(save_faults.KINDS, 56), RANKS, *save_faults.FLAGS)
    print(f"  {campaign.in_a_save} of {len(campaign.faults)} kills left a save that was not committed")


def storage(chaos: Chaos) -> None:
    """A job of two ranks whose checkpoints are in an object store that dies, then one whose disk is full."""
    with storage_faults.object_store() as store:
        campaign = storage_faults.StorageCampaign(chaos.job("store"), store, chaos.choose)
        chaos.meet(campaign, chaos.kinds(storage_faults.STORE_KINDS, 20), RANKS)
    with storage_faults.small_disk(chaos.folder / "small"):
        job = chaos.job("small/disk")
        campaign = storage_faults.StorageCampaign(job, storage_faults.Disk(job), chaos.choose)
        chaos.meet(campaign, chaos.kinds(storage_faults.DISK_KINDS, 10), RANKS)


def flows(chaos: Chaos) -> None:
    """Runs of a Prefect worker."""
    home = chaos.folder / "project"
    home.mkdir()
    with running_project(home) as project:
        runs(chaos, flow_faults.FlowCampaign(project, chaos.choose), chaos.kinds(flow_faults.KINDS, 2))


def services(chaos: Chaos) -> None:
    """Runs of `cherry run` beside Prefect and MLflow on PostgreSQL."""
    home = chaos.folder / "project"
    home.mkdir()
    with service_faults.services() as made:
        campaign = service_faults.ServiceCampaign(home, made, chaos.choose)
        runs(chaos, campaign, chaos.kinds(service_faults.KINDS, 2))


def runs(chaos: Chaos, campaign: flow_faults.FlowCampaign | service_faults.ServiceCampaign, kinds: list[str]) -> None:
    """Have runs meet faults; the campaign compares the losses of each."""
    try:
        campaign.run(kinds)
    finally:
        campaign.close()
        chaos.faults += campaign.faults


SUITES: dict[str, Callable[[Chaos], None]] = {
    "ssh": over_ssh,
    "slurm": under_slurm,
    "twice": twice,
    "saves": saves,
    "storage": storage,
    "flows": flows,
    "services": services,
}
# Most of the time a job waits for a lease or a heartbeat to be over. Hosts are there once on a machine.
SIDE_BY_SIDE = ("ssh", "slurm", "twice"), ("saves", "storage"), ("flows", "services")


def side_by_side(folder: Path, options: argparse.Namespace) -> tuple[list[Fault], list[str]]:
    """The faults of all suites, and the suites that broke off."""
    faults: dict[str, list[Fault]] = {}
    broken = list[str]()

    def one_after_the_other(names: Sequence[str]) -> None:
        for name in [one for one in names if one in options.only]:
            chaos = Chaos(folder / name, options.share, random.Random(f"{options.seed} {name}"))
            faults[name] = chaos.faults
            print(f"{name}: {(SUITES[name].__doc__ or '').strip()}", flush=True)
            try:
                SUITES[name](chaos)
            except MissingFileError as error:
                print(f"no faults of {name}: {error}", file=sys.stderr)
                broken.append(name)
            except Exception:  # what the other campaigns found still counts
                traceback.print_exc()
                broken.append(name)

    with ThreadPoolExecutor(len(SIDE_BY_SIDE)) as pool:
        list(pool.map(one_after_the_other, SIDE_BY_SIDE))
    return [one for name in SUITES for one in faults.get(name, [])], broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the whole suite's faults (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=sorted(SUITES), default=list(SUITES))
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the rows, as JSON")
    options = parser.parse_args()
    watch_this_process()
    # Ignored in the background of a shell, and so it would be in the jobs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cherry-chaos-") as name:
        faults, broken = side_by_side(Path(name), options)
    found = rows(faults)
    print(table(found))
    survived = sum(one.survived for one in faults)
    print(f"{survived} of {len(faults)} faults survived with nothing lost, in {time.monotonic() - began:.0f} s")
    if options.output is not None:
        command = shlex.join(["python", "-m", "benchmarks.chaos", *sys.argv[1:]])
        written = [{**row, "command": command, "date": date.today().isoformat()} for row in found]
        options.output.write_text("[\n" + ",\n".join(json.dumps(row) for row in written) + "\n]\n")
    if broken:
        print(f"without the faults of {', '.join(broken)}, which broke off: see above")
    return 0 if survived == len(faults) and not broken else 1


if __name__ == "__main__":
    raise SystemExit(main())
