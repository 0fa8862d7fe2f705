"""The command line as people write it, several nodes, and whose fault a failure is said to be."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import cuda

from base.errors import ConfigError, HardwareError, StoppedError, WeightsError, error_of_record, error_record
from cherry.launcher import PASSIVE_WAITING, _cause, _error_of, _set_rendezvous, _share_cores, launch
from tests.cherry.releases import release

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# A rank that fails alone, while its peer waits for it in a collective.
LONELY = """
import sys, torch.distributed as dist
from base.errors import WeightsError
from cherry import rank_main
def fail(options, rank, hooks):
    dist.init_process_group("gloo")
    if rank == 1:
        raise WeightsError("the shard that only rank 1 reads is broken")
    dist.barrier()
rank_main._train = fail
rank_main.main([])
"""


@pytest.mark.slow
def test_the_command_line_as_written(mini, prepared_data, tmp_path):
    folder, run = tmp_path / "released", tmp_path / "run"
    # A thousand steps of the smallest model.
    few = ("model.num_hidden_layers=1", "model.first_k_dense_replace=0", "model.num_nextn_predict_layers=0")
    experts = ("model.n_routed_experts=2", "model.n_group=1", "model.topk_group=1", "model.num_experts_per_tok=1")
    release(mini(*few, *experts).model, folder, prepared_data)

    def launch(*flags, ranks):
        command = [
            *(sys.executable, "-m", "cherry.launcher", f"--nproc_per_node={ranks}", "--nnodes=1", "train.py"),
            *(f"--model_path={folder}", *flags),
            # and what makes it short
            *(
                f"--run_dir={run}",
                "--set",
                f"data.source={prepared_data.parent}/*.txt",
                "--set",
                "data.sequence_length=32",
            ),
            *("--set", "data.heldout_fraction=0.2", "--set", "checkpoint.every_steps=1000"),
            *("--set", "train.log_every_steps=1000", "--set", "train.heldout_sequences=2"),
            *("--set", "train.spike_sigma=null"),  # a batch of one short sequence has losses of any height
        ]
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    ended = launch("--batch_size=1", "--learning_rate=1e-4", "--steps=1002", ranks=1)
    assert ended.returncode == 0, ended.stderr
    assert (run / "train" / "checkpoints" / "step_1000" / "COMMITTED").exists()
    shutil.rmtree(run / "train" / "checkpoints" / "step_1002")  # as if the node had been lost before it
    flags = ("--batch_size=16", "--learning_rate=1e-5", "--gradient_accumulation_steps=4")
    resume = "--resume_from=checkpoints/step_1000"
    ended = launch(*flags, resume, "--steps=900", ranks=1)
    assert ended.returncode == ConfigError.exit_code
    assert "step_1000 is at step 1000, train.steps is 900: nothing is left to train" in ended.stderr
    # As people write it, without a word on steps: to where the run was to end.
    ended = launch(*flags, resume, ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert "trains from step 1000 to 1002" in ended.stdout
    assert "step_1000: 1000 steps" in ended.stdout
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1000, 1002]
    assert lines[-1]["learning_rate"] < 1e-5
    state = json.loads((run / "train" / "checkpoints" / "step_1002" / "state.json").read_text())
    assert (state["position"], state["world_size"]) == (1000 + 2 * 16, 2)


@pytest.mark.slow
def test_two_nodes_train_as_one(make_job):
    alone, job = make_job("alone"), make_job("nodes")
    assert alone.run("--steps=4").returncode == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    for node in (1, 0):
        flags = ("--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}")
        command = job.command("--steps=4", launcher=flags)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        nodes.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes))
    for node in nodes:
        output, _ = node.communicate(timeout=120)
        assert node.returncode == 0, output
    assert job.losses == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.slow
def test_the_error_of_a_rank_that_fails_alone_is_printed_and_is_the_code(tmp_path):
    (tmp_path / "lonely.py").write_text(LONELY)
    command = [sys.executable, "-m", "cherry.launcher", "--nproc_per_node=2", str(tmp_path / "lonely.py")]
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == WeightsError.exit_code, ended.stderr
    assert "rank 1" in ended.stderr
    assert "the shard that only rank 1 reads is broken" in ended.stderr


@pytest.mark.slow
def test_sigusr1_logs_the_stacks_of_all_ranks_and_training_goes_on(make_job):
    job = make_job("stacks")
    process = job.start("--steps=100000", "--set", "train.schedule=constant", ranks=2)
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("step ") for line in lines)
    process.send_signal(signal.SIGUSR1)
    line = next(line for line in lines if "stacks of all threads" in line)
    assert f"rank-<n>.log in {job.directory}/train" in line
    # A step takes both ranks, and none goes on before it has handled the signal.
    for _ in range(2):
        assert any(line.startswith("step ") for line in lines)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    for rank in (0, 1):
        log = (job.directory / "train" / f"rank-{rank}.log").read_text()
        assert "most recent call first" in log and "trainer.py" in log, log
        assert "in run" in log


@pytest.mark.slow
def test_sigusr2_ends_the_job_after_a_checkpoint_of_its_step(make_job):
    job = make_job("told")
    process = job.start("--steps=100000", "--set", "train.schedule=constant", ranks=2)
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("step ") for line in lines)
    process.send_signal(signal.SIGUSR2)
    output = process.communicate()[0]
    assert process.returncode == StoppedError.exit_code, output
    last = job.metrics[-1]["step"]
    assert f"error: told to end: step {last} is saved. Run the same command again to resume." in output
    assert (job.checkpoint(last) / "COMMITTED").exists()


@dataclass
class Failure:
    """What torch's launcher says of one rank."""

    exitcode: int
    timestamp: int = 100


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ({0: Failure(1), 1: Failure(-9)}, 1),  # the peer's broken connection is no cause
        ({0: Failure(34), 1: Failure(14, 101)}, 1),  # what retrying cannot mend comes first
        ({0: Failure(1), 1: Failure(34)}, 1),
        ({0: Failure(-15), 1: Failure(32)}, 1),  # the launcher itself sends SIGTERM
        ({0: Failure(1, 102), 1: Failure(1, 101)}, 1),
        ({3: Failure(-9), 2: Failure(-9)}, 2),
    ],
)
def test_the_cause_among_failures(failures, rank):
    assert _cause(failures) == (rank, failures[rank])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_hosts_that_an_error_names_survive_the_launcher(rank):
    of_rank = {"cherry": error_record(HardwareError("other bits", ("node7", "node9")))}
    told = _error_of(rank, SimpleNamespace(exitcode=37, pid=5, error_file_data=of_rank))
    crossed = error_of_record(json.loads(json.dumps(error_record(told.origin or told))))
    assert isinstance(crossed, HardwareError)
    assert crossed.hosts == ("node7", "node9")
    assert "other bits" in str(crossed)


@pytest.mark.parametrize(
    "flag",
    [
        *("--nproc_per_node=x", "--nproc-per-node=0", "--nproc_per_node=-1", "--nnodes=two", "--nnodes=2:1"),
        "--nnodes=0",
        pytest.param("--nproc_per_node=gpu", marks=pytest.mark.skipif(cuda.is_available(), reason="a GPU is here")),
    ],
)
def test_a_number_of_ranks_that_cannot_be_is_a_config_error(flag, monkeypatch):
    for name in ("CHERRY_LAUNCHER_PID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "unchanged")  # launch sets them; the environment of other tests stays as it was
    name, value = flag.removeprefix("--").split("=")
    name = name.replace("-", "_")
    with pytest.raises(ConfigError, match=rf"--{name} must be .* \(got '{value}'\)"):
        launch([flag, "train.py"])


def test_several_nodes_without_a_port_meet_at_torchruns_and_threads_wait_passively(monkeypatch):
    options = SimpleNamespace(
        standalone=False, master_port=None, rdzv_backend="static", rdzv_endpoint="", nnodes="2", node_rank=1
    )
    _set_rendezvous(options)
    assert options.master_port == 29500
    for name in ("OMP_NUM_THREADS", *PASSIVE_WAITING):
        monkeypatch.setenv(name, "")  # so that it is afterwards as it was, also where it was not there
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # what the environment sets wins
    _share_cores(10_000)
    assert {name: os.environ[name] for name in PASSIVE_WAITING} == {**PASSIVE_WAITING, "OMP_WAIT_POLICY": "ACTIVE"}
    assert os.environ["OMP_NUM_THREADS"] == "1"


# One write a line: ranks that share a pipe must not meet inside a line.
NOOP = "import os, sys; sys.stdout.write(f\"rank {os.environ['RANK']} {os.environ['MASTER_PORT']}\\n\")"


def start(tmp_path, *flags, script=(), **environment):
    program = tmp_path / "noop.py"
    program.write_text(NOOP)
    command = [sys.executable, "-m", "cherry.launcher", *flags, str(program), *script]
    return subprocess.run(command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "environment", "ranks"),
    [
        (("--standalone", "--nproc-per-node=2"), {}, 2),
        (("--nproc-per-node=2",), {"PET_STANDALONE": "1"}, 2),
        (("--master_addr=127.0.0.1",), {}, 1),
        (("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"), {}, 1),
    ],
)
def test_a_rendezvous_as_torchrun_takes_it(tmp_path, flags, environment, ranks):
    ended = start(tmp_path, *flags, **environment)
    assert ended.returncode == 0, ended.stderr
    assert sorted(line.split()[:2] for line in ended.stdout.splitlines()) == [["rank", str(r)] for r in range(ranks)]


@pytest.mark.slow
def test_ports_come_from_flags_then_torchrun_s_variable_and_never_from_the_script_s_flags(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert start(tmp_path, PET_MASTER_PORT=str(port)).stdout.split() == ["rank", "0", str(port)]
    ended = start(tmp_path, script=["--master_port=1", "--standalone"])
    assert ended.returncode == 0 and ended.stdout.split()[2] not in ("1", "29500")
    nodes = start(tmp_path, "--nnodes=2", "--node_rank=2", "--master_addr=127.0.0.1")
    assert (nodes.returncode, "--node_rank must be from 0 to 1" in nodes.stderr) == (11, True)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--rdzv-conf=x", "rendezvous configuration option 'x'"),
        ("--rdzv-backend=nosuch", "'nosuch'"),
        ("--rdzv-endpoint=127.0.0.1:abc", "127.0.0.1:abc"),
        ("--master_port=99999", "--master_port must be from 1 to 65535 (got 99999)"),
        ("--master_port=0", "--master_port must be from 1 to 65535 (got 0)"),
        ("--node_rank=3", "--node_rank must be from 0 to 0"),
        ("--node_rank=one", "node_rank"),
        ("--max-restarts=-1", "max_restarts must be >= 0"),
        ("--redirects=9", "9 does not match"),
        ("--local-ranks-filter=a", "local_ranks_filter"),
    ],
)
def test_a_wrong_value_of_a_flag_is_a_sentence(tmp_path, monkeypatch, flag, said):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    more = ["--rdzv-backend=c10d"] if "endpoint" in flag else []
    with pytest.raises(ConfigError) as refused:
        launch([flag, *more, str(tmp_path / "never.py")])
    assert said in str(refused.value)
