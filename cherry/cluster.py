"""Cluster specs (configs/clusters): nodes and GPUs, provider, network, recovery, price, failure rate and storage.

A plan computes with them (cherry/planner); a provider takes the hosts (tasks/providers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)

from base.config import UNION_TAG, Matches, Problem, Section, validate
from base.durations import Duration
from base.yaml_config import CLUSTER_FILE, read_yaml
from cherry.hardware import GPUS
from cherry.job_config import NetworkConfig

LOCAL = "local"
SSH = "ssh"
SLURM = "slurm"
SKY = "sky"
_BUILT_IN = (LOCAL, SSH, SLURM, SKY)
SKY_IS_RENDERED = (
    "no run submits to provider sky, whose hosts share no run directory with this machine. Write the task (cherry "
    "cluster render CONFIG cluster=FILE > task.yaml), then submit it (sky jobs launch task.yaml)."
)
"""What to do with a cluster file of provider `sky`."""
# Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4).
LLAMA3_INTERRUPTIONS_PER_GPU_DAY = 419 / (54 * 16384)
_NODES_RULE = "must be a number of nodes above 0, or a list of them, like [{host: node1}, {host: node2}]"
_HOST_RULE = "must be a host's name or address; user and port have keys of their own, under ssh"
_HOSTS_DIRECTORY = Matches(
    r"^(/[\w.+@-]+)+$", "must be an absolute path on the hosts, like /scratch/cherry, without ~, $ and spaces"
)
_NAME = Matches(r"^[A-Za-z0-9][\w.,:+@/-]*$", "must be a name as sbatch takes it, without spaces")
_NODES = Matches(r"^[A-Za-z0-9][\w.,\[\]-]*$", "must be nodes as sbatch takes them, like node7 or gpu[1-4,9]")
# sbatch(1), --time.
_TIME = Matches(
    r"^(\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2})$",
    "must be a time as sbatch takes it: MINUTES, HOURS:MINUTES:SECONDS, or DAYS-HOURS like 2-00",
)
_OPTION = Matches(r"^--[a-z][a-z-]*(=[^\s\"'\\#]+)?$", "must be one long option of sbatch, like --constraint=h100")
_LINE = Matches(r"^[^\r\n]+$", "must be one line of shell")
_OWN_OPTIONS = frozenset(
    (
        *("account", "array", "chdir", "error", "exclude", "exclusive", "export", "gpus-per-node"),
        *("job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode"),
        *("output", "parsable", "partition", "qos", "requeue", "signal", "test-only", "time", "wait", "wrap"),
    )
)
"""Options of sbatch that the script sets itself, or that another key sets."""


class NodeSpec(Section):
    """A host of a cluster, and its GPUs."""

    example: ClassVar[str] = "{host: node1}"
    host: Annotated[str, Matches(r"^[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?$", _HOST_RULE)]
    """Name or address, as ssh takes it."""
    gpus: tuple[NonNegativeInt, ...] | None = None
    """GPUs that training may use, as the driver numbers them (CUDA_VISIBLE_DEVICES); `null` is all of them."""

    def problems(self) -> Iterator[Problem]:
        """A list of GPUs that is empty, or names one twice."""
        if self.gpus is not None and (not self.gpus or len(set(self.gpus)) != len(self.gpus)):
            yield Problem("gpus", "must name each GPU once, and at least one; null is all of them", list(self.gpus))


class SshConfig(Section):
    """How the hosts of provider `ssh` are reached. What is not set, ~/.ssh/config decides."""

    user: str | None = None
    """User name on the hosts."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port of their ssh servers."""
    identity: str | None = None
    """File of the private key; `null` takes those of ~/.ssh and of the ssh agent."""
    known_hosts: str | None = None
    """File with the hosts' public keys; `null` is ~/.ssh/known_hosts. A host whose key is not in it is refused."""
    python: str | None = None
    """Python interpreter of this project's environment on the hosts; `null` is the same path as here."""
    directory: str | None = None
    """Working directory on the hosts; `null` is the same path as here."""
    runs_directory: Annotated[str, _HOSTS_DIRECTORY] | None = None
    """Directory for run directories on each host's own disk, where the hosts share no file system with this machine:
    prepared data and checkpoints then go through an object store, and metrics and logs are carried over ssh. `null`:
    every host sees the run directory at the same path as here."""


class RecoveryConfig(Section):
    """What happens when a host or a rank of given hosts is lost: the job starts again from its newest checkpoint."""

    attempts: PositiveInt = 5
    """Starts of the job, the first one included."""
    spares: tuple[NodeSpec, ...] = ()
    """Hosts that take the place of lost ones."""
    min_nodes: PositiveInt | None = None
    """Fewest nodes to go on with when no spare is left; `null` waits for as many as the job began with."""
    backoff_s: NonNegativeFloat = 5.0
    """Seconds between the end of an attempt and the next, doubled after each one that made no steps."""
    hang_s: PositiveFloat | None = 30.0
    """Least seconds without a step after which a job counts as hanging; it must be three times the median step's too.
    `null` waits for the timeout of a collective."""


class SlurmConfig(Section):
    """How the job of provider `slurm` is submitted. What is not set, Slurm's own configuration decides."""

    partition: Annotated[str, _NAME] | None = None
    account: Annotated[str, _NAME] | None = None
    qos: Annotated[str, _NAME] | None = None
    """Quality of service."""
    time: Annotated[str, _TIME] | None = None
    """Time limit of a start of the job, like `1-00:00:00`, in quotes; `null` is the partition's."""
    warning_s: Annotated[int, Field(ge=1, le=65535)] = 180
    """Seconds before the time limit at which the job saves a checkpoint, ends and is queued again. A step and a save
    must fit in, and a minute more: Slurm may be that much early."""
    requeues: NonNegativeInt = 20
    """Times that the job may start again, be it after its time limit, a failure or a lost node."""
    exclude: tuple[Annotated[str, _NODES], ...] = ()
    """Nodes that the job never runs on, like `gpu7` or `gpu[1-4]`."""
    exclusive: bool = True
    """Whether the job has its nodes, with all cores and memory, for itself. With `false`, ask for both by `options`."""
    options: tuple[Annotated[str, _OPTION], ...] = ()
    """More options of sbatch, like `--constraint=h100`."""
    setup: tuple[Annotated[str, _LINE], ...] = ()
    """Lines of shell before the start, like `module load cuda`."""
    python: str | None = None
    """Python interpreter of this project's environment on the nodes; `null` is the same path as here."""

    @property
    def time_s(self) -> int | None:
        """The time limit in seconds."""
        if self.time is None:
            return None
        days, dash, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        if not dash and len(parts) < 3:
            parts = [0, *parts]  # MINUTES[:SECONDS]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    def problems(self) -> Iterator[Problem]:
        """A warning that comes before the start, and options that the script sets itself, or another key."""
        if self.time_s is not None and self.time_s <= self.warning_s:
            rule = f"must be longer than slurm.warning_s ({self.warning_s} s), or the job is told to end at its start"
            yield Problem("time", rule, self.time)
        own = [option for option in self.options if option[2:].partition("=")[0] in _OWN_OPTIONS]
        if own:
            yield Problem("options", "must not hold what the script or another key of slurm sets", own)


# SkyPilot's own names, where they differ; its A100 has 40 GB.
_SKY_ACCELERATORS = {"A100": "A100-80GB", "A100 40GB": "A100"}
_SKY_NAME = Matches(r"^[A-Za-z0-9][\w.-]*$", "must be an accelerator's name as `sky gpus list` has it")
_INFRA = Matches(r"^[A-Za-z*][\w.*:@/+-]*$", "must be CLOUD, CLOUD/REGION or kubernetes/CONTEXT, without spaces")
_FOLDER = Matches(r"^(s3|gs)://[\w.-]+(/[\w.=+-]+)+$", "must be a folder in a bucket, like s3://bucket/tiny/data")
_VARIABLE = Matches(r"^[A-Za-z_][A-Za-z0-9_]*$", "must be the name of an environment variable, without its value")
# A tilde would be quoted in the script.
_PROGRAM = Matches(r"^[\w./+-]+$", "must be a program's name or path on the hosts, without ~, $ and spaces")
_OWN_RESOURCES = frozenset(
    (
        *("accelerators", "any_of", "cloud", "disk_size", "image_id", "infra", "job_recovery"),
        *("ordered", "region", "spot_recovery", "use_spot", "zone"),
    )
)
"""Keys of SkyPilot's resources that the task sets itself, or that another key sets."""


class SkyConfig(Section):
    """The SkyPilot task of provider `sky`. What is not set, SkyPilot decides."""

    client: str | None = None
    """Python interpreter, on this machine, of an environment that has SkyPilot, whose parser then checks the task;
    `null` leaves that to `sky jobs launch`."""
    infra: Annotated[str, _INFRA] | None = None
    """Where hosts are taken, like `aws/us-east-1` or `kubernetes`; `null` is the cheapest place."""
    accelerator: Annotated[str, _SKY_NAME] | None = None
    """SkyPilot's name of the GPU; `null` is that of `gpu`."""
    use_spot: bool = False
    """Take spot instances, which cost less and may be taken away at any time."""
    image: str | None = None
    """Image of the hosts, like `docker:registry/name:tag`."""
    disk_size: PositiveInt | None = None
    """Size of each host's disk in GiB. It holds the prepared data and the program."""
    resources: dict[str, str | bool | int | float] = Field(default_factory=dict)
    """More of SkyPilot's `resources`, like `{network_tier: best}`."""
    workdir: str | None = None
    """Directory here that is copied to every host, where the task then starts."""
    setup: tuple[Annotated[str, _LINE], ...] = ()
    """Lines of shell that install this project on a host."""
    python: Annotated[str, _PROGRAM] = "python"
    """Python interpreter on the hosts that has this project."""
    data: Annotated[str, _FOLDER] | None = None
    """The run's prepared data (the folder `data` of a run directory) in a bucket, copied to every host. `null` lets a
    single host prepare data; several hosts need it, since they share no file system."""
    secrets: tuple[Annotated[str, _VARIABLE], ...] = ()
    """Names of environment variables whose values `sky jobs launch --secret NAME` passes on."""
    starts: PositiveInt = 5
    """Starts of the job without a new checkpoint in between, after which it ends. SkyPilot itself starts a job again
    without a limit after the exit codes that it is given."""
    max_restarts_on_errors: NonNegativeInt = 0
    """Times that the job also starts again after other exit codes, which are those of user errors and bugs."""

    def problems(self) -> Iterator[Problem]:
        """Resources that another key sets, and places that have providers of their own."""
        if own := sorted(self.resources.keys() & _OWN_RESOURCES):
            yield Problem("resources", "must not hold what the task or another key of sky sets", own)
        if self.infra is not None and (name := self.infra.partition("/")[0].lower()) in (SLURM, SSH):
            yield Problem("infra", f"must not be {name}: write a cluster file with provider {name}", self.infra)


def _nodes_tag(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        return UNION_TAG
    # Other values have no tag, and the rule as their error.
    return "number" if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


class ClusterSpec(Section):
    """A cluster as a file in configs/clusters/ describes it."""

    kind: Literal["local", "nodes"] = "nodes"
    """`local` is this machine; `nodes` is a cluster of equal hosts."""
    provider: str | None = None
    """Name of the provider that takes the hosts (tasks/providers). `null` is `ssh` where the nodes are named, else a
    cluster for plans. Of `sky`, `cherry cluster render` writes a SkyPilot task."""
    slots: PositiveInt | None = None
    """Ranks that this machine may run at one time; `null` allows as many as it has GPUs."""
    gpu: str | None = None
    """A name in cherry/hardware.py. With kind `local`, `null` takes the device that is found; with named nodes and with
    providers `slurm` and `sky`, it leaves out the plan."""
    nodes: Annotated[
        Annotated[PositiveInt, Tag("number")] | Annotated[tuple[NodeSpec, ...], Tag(UNION_TAG)],
        Discriminator(_nodes_tag, custom_error_type="nodes", custom_error_message=_NODES_RULE),
    ] = 1
    """Number of nodes, or a list of them, like `[{host: node1, gpus: [0, 1]}, {host: node2, gpus: [0, 1]}]`. A job
    takes the first `launch.nnodes` of the list; the others are spares."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of each node; `null` is as many as the nodes list, or 1."""
    max_lifetime: Duration | None = None
    """Longest time for which hosts are held, like `12h`; then they are given back, whatever runs on them. `null` is the
    provider's own: 30 days for this machine, given hosts and Slurm, one day for others."""
    communication: NetworkConfig = NetworkConfig()
    """Settings of NCCL and gloo on these hosts; what a job sets itself comes before them."""
    ssh: SshConfig = SshConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    slurm: SlurmConfig = SlurmConfig()
    sky: SkyConfig = SkyConfig()
    price_per_gpu_hour: NonNegativeFloat | None = None
    """Price of one GPU for an hour; `null` leaves costs out of the plan and the tracker."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """Currency of the price, by its ISO 4217 code."""
    interruptions_per_gpu_day: NonNegativeFloat = LLAMA3_INTERRUPTIONS_PER_GPU_DAY
    detection_s: NonNegativeFloat = 60.0
    """Seconds from a failure to the end of the attempt. A lost process is detected in a second, a lost node within a
    heartbeat, a hang only after communication.timeout_s. Assumed."""
    restart_s: NonNegativeFloat = 240.0
    """Seconds from the end of an attempt until the next one reads its checkpoint: host, imports, NCCL init. Assumed."""
    storage_write_bytes_s: PositiveFloat = 50e9
    """Bytes/s of all ranks together to checkpoint storage. Assumed: a mid-sized parallel file system."""
    storage_read_bytes_s: PositiveFloat = 100e9
    """Bytes/s of all ranks together from checkpoint storage. Assumed."""
    assumed_imbalance: float = Field(default=1.22, ge=1.0)
    """EP load imbalance: routed rows of the busiest EP rank over the mean. 1.22 is what the selection bias reached per
    expert (benchmarks/results/load_balance.jsonl); ranks that hold several experts are more even."""

    @property
    def named(self) -> tuple[NodeSpec, ...]:
        """The nodes, where the spec names them; else none."""
        return self.nodes if isinstance(self.nodes, tuple) else ()

    @property
    def node_count(self) -> int:
        """Number of nodes."""
        return self.nodes if isinstance(self.nodes, int) else len(self.nodes)

    @property
    def node_gpus(self) -> int:
        """Number of GPUs of each node."""
        listed = next((len(node.gpus) for node in self.named if node.gpus is not None), 1)
        return self.gpus_per_node or listed

    @property
    def has_gpus(self) -> bool:
        """Whether the spec tells of GPUs."""
        listed = any(node.gpus for node in self.named)
        return listed or self.gpu is not None or self.gpus_per_node is not None

    @property
    def gpus(self) -> int:
        """Number of GPUs of the whole cluster."""
        return self.node_count * self.node_gpus

    @property
    def sky_accelerator(self) -> str | None:
        """SkyPilot's name of the GPUs; `None` where it is not known."""
        name = self.sky.accelerator or _SKY_ACCELERATORS.get(self.gpu or "", self.gpu)
        return None if name is None or name == "laptop" or " " in name else name

    @property
    def hardware(self) -> str:
        """Name in cherry/hardware.py of a rank's device."""
        return self.gpu or "laptop"

    def excess(self, name: str, nodes: int, ranks_per_node: int) -> Iterator[Problem]:
        """Problems of a job that asks for more nodes than there are, or for more GPUs of each.

        Args:
            name: what the spec is called.
        """
        if nodes > self.node_count:
            yield Problem("launch.nnodes", f"cluster {name!r} has {self.node_count} nodes", nodes)
        if self.has_gpus and ranks_per_node > self.node_gpus:
            yield Problem("launch.nproc_per_node", f"cluster {name!r} has {self.node_gpus} GPUs a node", ranks_per_node)

    def problems(self) -> Iterator[Problem]:
        """Unknown hardware, keys that do not go with the kind, and nodes that are named twice or are unequal."""
        if (meant := (self.provider or "").strip().lower()) in _BUILT_IN and meant != self.provider:
            yield Problem("provider", f"did you mean {meant}? Names of providers have small letters", self.provider)
            return  # the other keys are those of the provider that is meant
        if self.gpu is not None and self.gpu not in GPUS:
            yield Problem("gpu", f"unknown hardware; known are {', '.join(GPUS)}", self.gpu)
        choosing = self.provider in (SLURM, SKY)
        if self.kind == "nodes" and self.gpu is None and isinstance(self.nodes, int) and not choosing:
            rule = f"is required with kind nodes, unless the nodes are named: one of {', '.join(GPUS)}"
            yield Problem("gpu", rule, None, of=("nodes",))
        if self.kind == LOCAL and self.provider not in (None, LOCAL):
            yield Problem("provider", "must be local, or left out, with kind local", self.provider)
        if self.kind == LOCAL and self.nodes != 1:
            rule = "must be 1 with kind local: it is this machine only"
            yield Problem("nodes", rule, [node.host for node in self.named] or self.nodes)
        if choosing and self.named:
            rule = f"must be a number with provider {self.provider}, which chooses the hosts"
            yield Problem("nodes", rule, self.node_count)
        for key, empty in ((SLURM, SlurmConfig()), (SKY, SkyConfig())):
            if self.provider != key and getattr(self, key) != empty:
                yield Problem(key, f"is for provider {key}", self.provider)
        if self.provider == SKY and self.has_gpus and self.sky_accelerator is None:
            rule = "must be SkyPilot's name of the GPUs, which gpu does not tell"
            yield Problem("sky.accelerator", rule, self.gpu)
        yield from self._given_hosts_problems()

    def _given_hosts_problems(self) -> Iterator[Problem]:
        """Problems of nodes that are named, and of keys that are for them alone."""
        if isinstance(self.nodes, int):
            given = {"ssh": SshConfig(), "recovery": RecoveryConfig()}
            if self.provider not in (SLURM, SKY):
                given["communication"] = NetworkConfig()
            for key in (key for key, empty in given.items() if getattr(self, key) != empty):
                yield Problem(key, "is for nodes that are named: nodes: [{host: node1}, ...]", self.nodes)
            if self.provider == SSH:
                yield Problem("nodes", "must name the hosts with provider ssh: nodes: [{host: node1}, ...]", self.nodes)
            return
        if not self.nodes:
            yield Problem("nodes", "must name at least one host, or be a number", [])
        every = [*self.nodes, *self.recovery.spares]
        twice = [host for host, count in Counter(node.host for node in every).items() if count > 1]
        if twice:
            rule = f"each host must be named once, as a node or a spare, and {', '.join(twice)} is twice"
            yield Problem("nodes", rule, [node.host for node in every])
        unequal = [node.host for node in every if node.gpus is not None and len(node.gpus) != self.node_gpus]
        if unequal:
            rule = f"must list {self.node_gpus} GPUs for each node, as all nodes have equally many ranks"
            yield Problem("nodes", f"{rule}: {', '.join(unequal)} differs", self.node_gpus)
        if self.recovery.min_nodes is not None and self.recovery.min_nodes > len(self.nodes):
            rule = f"must be at most the number of nodes ({len(self.nodes)})"
            yield Problem("recovery.min_nodes", rule, self.recovery.min_nodes)


def read_cluster(name: str) -> ClusterSpec:
    """The cluster spec at a path, or this machine's for `local`.

    Raises:
        MissingFileError, ConfigError: no such file, or one that breaks a rule.
    """
    if name == LOCAL:
        return ClusterSpec(kind="local")
    return validate(read_yaml(name, kind=CLUSTER_FILE), ClusterSpec, origin=name)
