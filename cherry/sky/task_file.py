"""The SkyPilot task of a training job: one launcher a host, which all start again from the newest checkpoint.

The hosts share no file system. The task carries the job's configuration, prepared data is copied from a bucket, and
checkpoints go to an object store. A task is text: nothing here knows whether SkyPilot is installed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from base import storage
from base.config import Problem
from base.errors import TRANSIENT_EXIT_CODES, ConfigError, SupersededError
from cherry.cluster import ClusterSpec
from cherry.job_config import NETWORK_VARIABLE, JobConfig
from cherry.launcher import TRAIN_MODULE

RECOVERED = [code for code in TRANSIENT_EXIT_CODES if code != SupersededError.exit_code]
"""Exit codes of transient errors, after which SkyPilot starts the job again. A superseded attempt has a successor."""
_DIRECTORY = "cherry"
"""Folder in the home directory of a host that run directories are in."""
# torchrun's own default; the hosts are the job's alone.
_PORT = 29500
_END = "END_OF_JOB_CONFIG"
_RUN = """\
run="$HOME/{directory}/{name}"
mkdir -p "$run"
cat > "$run/job.yaml" << '{end}'
{config}{end}
export PYTHONUNBUFFERED=1
if [ "$SKYPILOT_NODE_RANK" = 0 ]; then
  {python} -P -m cherry.sky.start --directory={checkpoints} --starts={starts} || exit
fi
# Rank 0 is on the first host. The exit code decides whether SkyPilot starts the job again.
exec {python} -P -m cherry.launcher --nnodes="$SKYPILOT_NUM_NODES" --node_rank="$SKYPILOT_NODE_RANK" \\
  --nproc_per_node={ranks} --master_addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master_port={port} \\
  --max-restarts=0 -m {program} --config "$run/job.yaml" --run_dir "$run"
"""


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, as a person would."""

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> yaml.ScalarNode:
        return super().represent_scalar(tag, value, style="|" if "\n" in value else style)


def render(config: JobConfig, spec: ClusterSpec, *, origin: str) -> str:
    """Text of the SkyPilot task of a job, in YAML.

    Args:
        origin: what the cluster file is called, for errors.

    Raises:
        ConfigError: the job needs more hosts than the file has, or files that no host would have; lists every problem.
    """
    if found := [str(problem) for problem in _problems(config, spec, origin)]:
        count = f"{len(found)} problem" + ("s" if len(found) > 1 else "")
        lines = "\n".join(f"  {line}" for line in found)
        raise ConfigError(f"{origin}: {count} with this job on its hosts, which share no file system\n{lines}")
    options, nodes = spec.sky, config.launch.nnodes
    task: dict[str, Any] = {
        "name": config.name,
        "num_nodes": nodes,
        "resources": _resources(spec, config.launch.nproc_per_node),
        "workdir": options.workdir,
        "envs": {NETWORK_VARIABLE: json.dumps(spec.communication.given())},
        "secrets": dict.fromkeys(options.secrets),  # names; the values are given at the submission
        "file_mounts": {f"~/{_DIRECTORY}/{config.name}/data": options.data} if options.data else None,
        "setup": "".join(f"{line}\n" for line in ("set -e", *options.setup)) if options.setup else None,
        "run": _script(config, spec),
    }
    given = {key: value for key, value in task.items() if value}
    return yaml.dump(given, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _resources(spec: ClusterSpec, ranks: int) -> dict[str, Any]:
    options = spec.sky
    given = {
        "infra": options.infra,
        "accelerators": f"{spec.sky_accelerator}:{ranks}" if spec.has_gpus else None,
        "use_spot": options.use_spot or None,
        "image_id": options.image,
        "disk_size": options.disk_size,
    }
    recovery = {"max_restarts_on_errors": options.max_restarts_on_errors, "recover_on_exit_codes": RECOVERED}
    return {
        **{key: value for key, value in given.items() if value is not None},
        **options.resources,
        "job_recovery": recovery,
    }


def _script(config: JobConfig, spec: ClusterSpec) -> str:
    """Lines of shell that start the launcher on one host."""
    sections = config.model_dump(mode="json", include=set(JobConfig.model_fields))
    return _RUN.format(
        directory=_DIRECTORY,
        name=config.name,
        end=_END,
        config=yaml.safe_dump(sections, sort_keys=False, allow_unicode=True),
        python=spec.sky.python,
        checkpoints=shlex.quote(str(config.checkpoint.directory)),
        starts=spec.sky.starts,
        ranks='"$SKYPILOT_NUM_GPUS_PER_NODE"' if spec.has_gpus else config.launch.nproc_per_node,
        port=config.launch.master_port or _PORT,
        program=TRAIN_MODULE,
    )


def _problems(config: JobConfig, spec: ClusterSpec, origin: str) -> Iterator[Problem]:
    """What the job asks of the hosts that they do not have."""
    launch, data = config.launch, config.data
    yield from spec.excess(origin, launch.nnodes, launch.nproc_per_node)
    yield from config.problems_apart()
    if spec.sky.data is not None:
        return  # what it was prepared from is not read again
    if launch.nnodes > 1:
        rule = "must name the run's prepared data in a bucket, as each of several hosts needs the same"
        yield Problem(f"sky.data of {origin}", rule, None)
        return
    uris = {"data.tokenizer": data.tokenizer, "data.chat_template": data.chat_template}
    if data.source != "python-stdlib":
        uris["data.source"] = data.source
    for key, uri in uris.items():
        if uri is not None and storage.is_local(uri):
            yield Problem(key, f"must be a URI of an object store, unless sky.data of {origin} is set", uri)
