"""Provision: what is checked before hosts are taken, and that hosts are recorded, taken and given back."""

import sys
from pathlib import Path

import psutil
import pytest

from base import storage
from base.errors import ConfigError, DoesNotFitError, InvalidInputError, OperationalError
from cherry.cluster import read_cluster
from cherry.planner.plan import checkpoint_bytes
from tasks.interruptions.leftovers import end_leftovers
from tasks.lease import take_lease
from tasks.overrides import resolve
from tasks.providers.protocol import read_hosts, read_reservation, write_reservation
from tasks.provision import check_disk, hold_hosts, preflight, release, take_hosts
from tasks.steps import RunContext

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")
SPEC = "kind: nodes\nprovider: two-hosts\ngpu: H100\nnodes: [{{host: 127.0.0.1}}, {{host: {second}}}]\n"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"launch": {"nnodes": 2, "master_port": 29500}}, ConfigError, r"launch\.nnodes: cluster 'local' has one node"),
        ({"cluster": "slots.yaml", "launch": {"nproc_per_node": 4}}, ConfigError, "has 2 slots"),
        ({"model": {"preset": "671b"}, "train": {"batch_size": 16}}, DoesNotFitError, "usable: .* GiB of this CPU"),
        (
            {"cluster": "nodes.yaml"},
            ConfigError,
            r"names no provider.* \(known providers: local, slurm, ssh, two-hosts\)",
        ),
        (
            {"cluster": "kubernetes.yaml"},
            ConfigError,
            r"needs provider 'kubernetes'.* \(known providers: local, slurm, ssh, two-hosts\)",
        ),
        ({"cluster": "gpu.yaml", "model": {"preset": "16b"}}, DoesNotFitError, r"no room for (.|\n)*What would fit:"),
        (
            {"cluster": "pair.yaml", "launch": {"nnodes": 4, "master_port": 29500}},
            ConfigError,
            r"launch\.nnodes: the cluster has 2 \(got 4\)",
        ),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(tmp_path, monkeypatch, two_hosts, changes, error, match):
    config = resolve(TINY, {**changes, "runs_directory": str(tmp_path)})
    (tmp_path / "slots.yaml").write_text("kind: local\nslots: 2\n")
    (tmp_path / "nodes.yaml").write_text("kind: nodes\ngpu: H100\nnodes: 4\ngpus_per_node: 8\n")
    (tmp_path / "kubernetes.yaml").write_text("kind: nodes\nprovider: kubernetes\ngpu: H100\n")
    (tmp_path / "gpu.yaml").write_text("kind: nodes\nprovider: two-hosts\ngpu: H100\nnodes: [{host: 127.0.0.1}]\n")
    (tmp_path / "pair.yaml").write_text(SPEC.format(second="127.0.0.2"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        preflight(config, tmp_path / "run", "run-0")


def test_the_shipped_large_run_is_refused_before_anything_is_taken(tmp_path):
    """configs/671b.yaml wants 32 nodes, of this machine or of a cluster that no provider takes."""
    config = resolve(str(ROOT / "configs" / "671b.yaml"), {"init_from": "weights"})
    with pytest.raises(ConfigError, match=r"launch\.nnodes: .* \(got 32\)"):
        preflight(config, tmp_path, "run-0")
    spec = str(ROOT / "configs" / "clusters" / "h100-256.yaml")
    with pytest.raises(ConfigError, match=r"h100-256\.yaml names no provider.*known providers: local"):
        preflight(config.model_copy(update={"cluster": spec}), tmp_path, "run-0")
    assert list(tmp_path.iterdir()) == []


def test_disk_is_needed_for_the_checkpoints_that_are_kept_and_one_more():
    config = resolve(TINY, {"checkpoint": {"keep_last": 2}})
    model = config.model
    bias = (model.n_moe_layers + model.num_nextn_predict_layers) * model.n_routed_experts  # selects, is not trained
    assert checkpoint_bytes(config) == 12 * (model.parameters(with_mtp=True) - bias)
    check_disk(config, 3 * checkpoint_bytes(config))
    with pytest.raises(OperationalError, match=r"disk: 3 checkpoints .* GiB are free"):
        check_disk(config, 3 * checkpoint_bytes(config) - 1)
    elsewhere = resolve(TINY, {"checkpoint": {"directory": "s3://bucket/checkpoints"}})
    check_disk(elsewhere, 0)


def test_adapters_and_narrow_moments_need_less_disk():
    """The frozen 16B weights are saved in fp32, and have no moments."""
    base = resolve(str(ROOT / "configs" / "16b.yaml"), {"init_from": "weights"})
    narrow = resolve(str(ROOT / "configs" / "16b.yaml"), {"init_from": "w", "train": {"optimizer_state_dtype": "bf16"}})
    lora = resolve(str(ROOT / "configs" / "16b.yaml"), {"init_from": "weights", "lora": {"rank": 16}})
    assert checkpoint_bytes(base) / checkpoint_bytes(narrow) == pytest.approx(12 / 8)
    assert 63e9 < checkpoint_bytes(lora) + 0.1e9 < 63.2e9
    check_disk(lora, 260_000_000_000)
    with pytest.raises(OperationalError):
        check_disk(base, 260_000_000_000)


def test_memory_is_what_the_plan_says_of_all_ranks_of_this_machine(tmp_path):
    config = resolve(TINY, {"runs_directory": str(tmp_path), "launch": {"nproc_per_node": 2}})
    reservation, plan = preflight(config, tmp_path, "run-0")
    assert plan is not None
    assert reservation.memory_bytes_per_node == plan.host_bytes_per_node > 2 * plan.worst.total
    large = {"model": {"preset": "671b"}, "train": {"batch_size": 16}, "plan": {"refuse": False}}
    large["checkpoint"] = {"directory": "s3://bucket/checkpoints"}
    reservation, plan = preflight(resolve(TINY, large), tmp_path, "run-0")
    assert not plan.fits
    assert reservation.memory_bytes_per_node == 0


@pytest.fixture
def context(tmp_path, two_hosts):
    """A run on a cluster of two loopback addresses."""
    (tmp_path / "pair.yaml").write_text(SPEC.format(second="127.0.0.2"))
    config = resolve(
        TINY,
        {
            "runs_directory": str(tmp_path),
            "cluster": str(tmp_path / "pair.yaml"),
            "launch": {"nnodes": 2, "master_port": 29500},
            "tracking": {"uri": "http://127.0.0.1:9"},  # nothing listens there
        },
    )
    (tmp_path / "tiny").mkdir()
    return RunContext(str(tmp_path / "tiny"), config)


def calls(context):
    return [line.split()[0] for line in (context.path.parent / "calls").read_text().splitlines()]


def allocations(context):
    return list((context.path.parent / "allocations").glob("*/*"))


def test_hosts_are_taken_held_and_given_back_once(context):
    take_lease(context.path)
    hosts, plan = take_hosts(context)
    assert plan.work.ranks == 2
    assert [host.address for host in hosts.hosts] == ["127.0.0.1", "127.0.0.2"]
    assert read_hosts(context.path) == hosts
    assert hold_hosts(context)[1] == hosts
    assert calls(context) == ["acquire"]
    release(context.directory)
    release(context.directory)
    assert calls(context) == ["acquire", "release"]
    assert allocations(context) == []
    assert read_reservation(context.path) is None
    assert read_hosts(context.path) == hosts, "what the run was done on stays on record"


def test_hosts_are_held_for_the_time_of_their_cluster_file_and_no_attempt_begins_after_it(context):
    path = Path(context.config.cluster)
    path.write_text(f"{path.read_text()}max_lifetime: 2h\n")
    take_lease(context.path)
    take_hosts(context)
    held = read_reservation(context.path)
    assert held.until - held.since == pytest.approx(7200.0)
    write_reservation(context.path, held.model_copy(update={"since": held.since - 7300, "until": held.until - 7300}))
    with pytest.raises(
        InvalidInputError, match=r"max_lifetime: the hosts of .*pair\.yaml were held for 2h, the longest"
    ):
        hold_hosts(context)
    assert calls(context) == ["acquire"]
    release(context.directory)
    take_lease(context.path)
    hold_hosts(context)  # a new start holds them for as long again
    assert calls(context) == ["acquire", "release", "acquire"]
    release(context.directory)


def test_hosts_that_were_given_back_or_lost_are_taken_anew(context):
    take_lease(context.path)
    take_hosts(context)
    release(context.directory)
    take_lease(context.path)
    hold_hosts(context)
    assert calls(context) == ["acquire", "release", "acquire"]
    allocations(context)[0].unlink()  # a host is gone
    hold_hosts(context)
    assert calls(context)[3:] == ["release", "acquire"]
    assert len(allocations(context)) == 2
    release(context.directory)


def test_what_was_taken_before_a_failure_is_given_back(context):
    Path(context.config.cluster).write_text(SPEC.format(second="node7.invalid"))
    take_lease(context.path)
    with pytest.raises(OperationalError, match=r"node7\.invalid"):
        take_hosts(context)
    assert len(allocations(context)) == 1
    with pytest.raises(OperationalError, match=r"node7\.invalid"):  # a retry releases before it asks again
        take_hosts(context)
    assert calls(context) == ["acquire", "release", "acquire"]
    release(context.directory)
    assert allocations(context) == []


def test_hosts_of_a_flow_that_was_killed_are_given_back_by_whoever_finds_them(context):
    take_lease(context.path)
    take_hosts(context)
    lease = context.path / "lease.json"
    storage.write_json(str(lease), {**storage.read_json(str(lease)), "created": psutil.Process().create_time() - 100.0})
    end_leftovers(context.config)
    assert calls(context) == ["acquire", "release"]
    assert not lease.exists()


def test_hosts_of_a_provider_that_is_gone_stay_on_record(context, two_hosts, monkeypatch, caplog):
    take_lease(context.path)
    take_hosts(context)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [path for path in sys.path if path != str(two_hosts)])
        release(context.directory)
    assert "no provider 'two-hosts' is installed" in caplog.text
    assert read_reservation(context.path) is not None
    assert not (context.path / "lease.json").exists()
    end_leftovers(context.config)
    assert allocations(context) == []


def test_a_reservation_of_another_version_is_named(context):
    storage.write_json(str(context.path / "reservation.json"), {"provider": "two-hosts"})
    with pytest.raises(ConfigError, match=r"reservation\.json: .*cluster"):
        take_hosts(context)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("kind: slurm\nslotz: 2\n", "slotz"),
        ("kind: local\nprovider: two-hosts\n", "provider: must be local"),
        ("kind: nodes\ngpu: H100\nhosts: [a]\n", "hosts: unknown key"),
        ("kind: local\nnodes: [{host: a}]\n", "nodes: must be 1 with kind local"),
        ("kind: nodes\ngpu: H100\nprovider: p\nnodes: [{host: a}, {host: a}]\n", "a is twice"),
    ],
)
def test_cluster_files_are_read_strictly(tmp_path, text, match):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_cluster(str(tmp_path / "wrong.yaml"))


def test_shipped_cluster_files_are_sound():
    for path in (ROOT / "configs" / "clusters").glob("*.yaml"):
        assert read_cluster(str(path)).kind == ("local" if path.stem in ("local", "laptop") else "nodes")
