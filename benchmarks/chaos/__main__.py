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
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from benchmarks.chaos import flow_faults, slurm_faults, ssh_faults, store_faults
from benchmarks.chaos.campaign import FLAGS, Campaign
from benchmarks.chaos.record import Fault, rows, table
from benchmarks.chaos.save_faults import RANKS, SaveCampaign
from tests import hosts, slurm
from tests.project import running_project
from tests.training_job import Job, prepare_documents, write_config
from tests.watcher import watch_this_process


@dataclass
class Chaos:
    """What all campaigns share: a folder, prepared data, and chance."""

    folder: Path
    share: float
    """Of the faults that the whole suite has."""
    choose: random.Random
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prepared = prepare_documents(self.folder)
        self._config = write_config(self.folder / "mini.yaml", self._prepared)

    def job(self, name: str) -> Job:
        return Job(self.folder / name, self._config, self._prepared)

    def kinds(self, every: Sequence[str], whole: int) -> list[str]:
        """Each kind so often, in any order."""
        kinds = list(every) * self.count(whole)
        self.choose.shuffle(kinds)
        return kinds

    def meet(self, campaign: Campaign, kinds: list[str], ranks: int) -> None:
        """Have a campaign meet faults of these kinds."""
        try:
            losses = campaign.run(kinds)
        finally:
            campaign.close()
        self.add(campaign.faults, losses, ranks, *FLAGS)

    def count(self, whole: int) -> int:
        return max(1, round(whole * self.share))

    def add(self, faults: list[Fault], losses: list[float], ranks: int, *flags: str) -> None:
        """Take the faults of a job, whose losses shall be those of an unbroken job with the same flags."""
        unbroken = self.job(f"unbroken-{len(self.faults)}")
        ended = unbroken.run(f"--steps={len(losses)}", "--set", "train.schedule=constant", *flags, ranks=ranks)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        for one in faults:
            one.losses_equal = unbroken.losses == losses
        self.faults += faults


def over_ssh(chaos: Chaos) -> None:
    """Jobs on two hosts with a spare, then on three with a spare."""
    if (reason := hosts.missing()) is not None:
        print(f"no faults over ssh: {reason}", file=sys.stderr)
        return
    for nodes in (2, 3):
        with ssh_faults.hosts_of(nodes + 1) as lab:
            campaign = ssh_faults.SshCampaign(chaos.job(f"ssh-{nodes}"), lab, nodes, chaos.choose)
            chaos.meet(campaign, chaos.kinds(ssh_faults.KINDS, 5), nodes)


def under_slurm(chaos: Chaos) -> None:
    """A job on two of three nodes."""
    if (reason := slurm.missing()) is not None:
        print(f"no faults under Slurm: {reason}", file=sys.stderr)
        return
    with contextmanager(slurm.slurm_lab)(chaos.folder / "slurm", 3) as lab:
        campaign = slurm_faults.SlurmCampaign(chaos.job("queued"), lab, 2, chaos.choose)
        chaos.meet(campaign, chaos.kinds(slurm_faults.KINDS, 3), 2)


def saves(chaos: Chaos) -> None:
    """A job of two ranks that saves all the time."""
    campaign = SaveCampaign(chaos.job("saves"), chaos.choose)
    losses = campaign.run(chaos.count(50))
    print(f"  {campaign.in_a_save} of {len(campaign.faults)} kills left a save that was not committed")
    chaos.add(campaign.faults, losses, RANKS)


def store(chaos: Chaos) -> None:
    """A job of two ranks whose checkpoints are in an object store that fails."""
    with store_faults.object_store() as server:
        campaign = store_faults.StoreCampaign(chaos.job("store"), server, chaos.choose)
        try:
            losses = campaign.run(chaos.count(20))
        finally:
            campaign.close()
    chaos.add(campaign.faults, losses, RANKS)


def flows(chaos: Chaos) -> None:
    """Runs of a Prefect worker."""
    home = chaos.folder / "project"
    home.mkdir()
    with running_project(home) as project:
        campaign = flow_faults.FlowCampaign(project, chaos.choose)
        try:
            campaign.run(chaos.kinds(flow_faults.KINDS, 3))
        finally:
            campaign.close()
    chaos.faults += campaign.faults


SUITES: dict[str, Callable[[Chaos], None]] = {
    "ssh": over_ssh,
    "slurm": under_slurm,
    "saves": saves,
    "store": store,
    "flows": flows,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the whole suite's faults (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=sorted(SUITES), default=list(SUITES))
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the rows, as JSON")
    options = parser.parse_args()
    watch_this_process()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    began, broken = time.monotonic(), list[str]()
    with tempfile.TemporaryDirectory(prefix="cherry-chaos-") as name:
        chaos = Chaos(Path(name), options.share, random.Random(options.seed))
        for suite in options.only:
            print(f"{suite}: {(SUITES[suite].__doc__ or '').strip()}", flush=True)
            try:
                SUITES[suite](chaos)
            except Exception:  # what the other campaigns found still counts
                traceback.print_exc()
                broken.append(suite)
    found = rows(chaos.faults)
    print(table(found))
    survived = sum(one.survived for one in chaos.faults)
    print(f"{survived} of {len(chaos.faults)} faults survived with nothing lost, in {time.monotonic() - began:.0f} s")
    if options.output is not None:
        command = shlex.join(["python", "-m", "benchmarks.chaos", *sys.argv[1:]])
        written = [{**row, "command": command, "date": date.today().isoformat()} for row in found]
        options.output.write_text("[\n" + ",\n".join(json.dumps(row) for row in written) + "\n]\n")
    if broken:
        print(f"without the faults of {', '.join(broken)}, which broke off: see above")
    return 0 if survived == len(chaos.faults) and not broken else 1


if __name__ == "__main__":
    raise SystemExit(main())
