"""`cherry cluster check`: the preflight of a cluster file's hosts, as tables or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from base.errors import ConfigError
from cherry.cluster import LOCAL, SLURM, SSH, NodeSpec, read_cluster
from cherry.remote.facts import HostFacts, Needs, code_digest, collect_facts, unfit
from cherry.remote.preflight import HostReport, Report, check_hosts
from flows.clusters.tables import fitted
from tasks.providers.registry import find_provider, provider_name, reserve

_GIB = 2**30
_HEADINGS = ("host", "state", "address", "clock", "python", "torch", "driver", "code", "GPUs", "free", "memory", "disk")
_DIGEST_LETTERS = 8


def check_cluster(cluster: str, runs_directory: Path, *, as_json: bool) -> None:
    """Print a row for each host, and the bandwidth of an all-reduce; as JSON it is one object.

    Raises:
        MissingFileError, ConfigError: the file is missing or wrong, or a host needs mending; the text names each.
        OperationalError: hosts do not answer now, or are in use.
    """
    spec, console = read_cluster(cluster), Console()
    provider = provider_name(cluster, spec)
    if provider == LOCAL:
        report = _this_machine(runs_directory)
        if not as_json:
            _show_hosts(console, report)
    elif provider == SSH:
        report = check_hosts(spec, runs_directory, lambda found: None if as_json else _show_hosts(console, found))
    else:
        asked = reserve(
            cluster, spec, str(runs_directory), "check", nodes=spec.node_count, ranks_per_node=spec.node_gpus
        )
        find_provider(provider).check(asked)
        if provider == SLURM:
            raise ConfigError(
                f"{cluster}: Slurm would take a job of {spec.node_count} nodes. Which they are is known once it runs, "
                "so no host is checked here."
            )
        raise ConfigError(
            f"{cluster}: provider {provider} has the hosts, and which they are is known once they are taken. Take them "
            f"(`cherry cluster up {cluster}`), and check the cluster file that it prints."
        )
    if as_json:
        print(json.dumps(_values(report), indent=2))
    else:
        _show_bandwidths(console, report)
    if (error := report.error()) is not None:
        raise error
    if not as_json:
        console.print("\nevery host is fit", highlight=False)


def _this_machine(runs_directory: Path) -> Report:
    # Nobody else has to reach it.
    facts = collect_facts(str(runs_directory), None).model_copy(update={"reached_at": "127.0.0.1"})
    needs = Needs(1, None, code_digest(), free_gpus=True)
    reasons = list(unfit(NodeSpec(host="127.0.0.1"), facts, needs, now=facts.time))
    text = "; ".join(reason.text for reason in reasons)
    error = ConfigError(f"this machine: {text}.") if reasons else None
    return Report([HostReport("this machine", facts, 0.0, error)])


def _show_hosts(console: Console, report: Report) -> None:
    rows = []
    for host in report.hosts:
        state = "[green]fit[/]" if host.error is None else "[bold red]unfit[/]"
        rows.append((escape(host.host), state, *map(escape, _cells(host))))
    for number, table in enumerate(fitted(_HEADINGS, rows, console.width)):
        if number:
            console.print()
        console.print(table)
    if report.hosts and (code := code_digest()):
        console.print(f"code here: {code[:_DIGEST_LETTERS]}", highlight=False)


def _cells(host: HostReport) -> list[str]:
    facts = host.facts
    if facts is None:
        return ["no answer"] + ["-"] * (len(_HEADINGS) - 3)
    torch = facts.torch or "none"
    if facts.cuda is not None:
        torch += f" (CUDA {facts.cuda})"
    return [
        _address(facts),
        f"{host.skew_s or 0.0:+.1f} s",
        facts.python,
        torch,
        facts.driver or "-",
        facts.code[:_DIGEST_LETTERS],
        _gpus(facts),
        "-" if facts.gpu_facts is None else str(sum(not gpu.is_busy for gpu in facts.gpu_facts)),
        f"{facts.memory_gib:.0f} GiB",
        f"{facts.free_bytes / _GIB:.0f} GiB",
    ]


def _address(facts: HostFacts) -> str:
    """The address by which ssh reached it, with its interface, and what its own name resolves to if that differs."""
    interface = facts.interface(None)
    address = (facts.reached_at or "-") + (f" ({interface})" if interface else "")
    other = facts.own_address not in (None, facts.reached_at)
    return f"{address}, own name {facts.own_address}" if other and facts.reached_at else address


def _gpus(facts: HostFacts) -> str:
    """Number of GPUs, with what NVML says of their health."""
    if not facts.gpus:
        return "0"
    if facts.gpu_facts is None:
        return f"{facts.gpus} (health unknown: no nvidia-ml-py)"
    sick = sum(bool(list(gpu.faults())) for gpu in facts.gpu_facts)
    errors = sum(gpu.uncorrected_ecc_errors or 0 for gpu in facts.gpu_facts)
    return f"{facts.gpus} {facts.gpu_facts[0].name}, {sick or 'none'} faulty, {errors} ECC errors"


def _show_bandwidths(console: Console, report: Report) -> None:
    if not report.ranks:
        console.print("\nno all-reduce: it needs two ranks, on named hosts that are fit", highlight=False)
        return
    hosts = f"{', '.join(report.ranks)}, {report.ranks_per_host} ranks each"
    console.print(f"\nall-reduce over {hosts}", highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for heading in ("size", "time", "algorithm bandwidth", "bus bandwidth"):
        table.add_column(heading, justify="right")
    for row in report.bandwidths:
        rates = [f"{row[key] / 1e9:.3g} GB/s" for key in ("algorithm_bytes_s", "bus_bytes_s")]
        table.add_row(f"{row['bytes'] / 2**20:g} MiB", f"{row['seconds'] * 1e3:.2f} ms", *rates)
    console.print(table)


def _values(report: Report) -> dict[str, Any]:
    """JSON values; sizes are bytes, times seconds. Keys are only ever added."""
    return {
        "hosts": [
            {
                "host": host.host,
                "fit": host.error is None,
                "error": None if host.error is None else str(host.error),
                "clock_skew_s": host.skew_s,
                "facts": host.facts and host.facts.model_dump(mode="json"),
            }
            for host in report.hosts
        ],
        "all_reduce": {
            "hosts": report.ranks,
            "ranks_per_host": report.ranks_per_host,
            "sizes": report.bandwidths,
            "error": None if report.failure is None else str(report.failure),
        },
    }
