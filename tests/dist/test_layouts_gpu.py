"""Two GPUs over NCCL train what one trains, along every axis; compressed, adapted and resumed runs stay close to it."""

import shutil

import pytest
import torch

from cherry.export import export

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
EXPERT, REPLICATE = "parallel.expert=2", "parallel.replicate=2"
EXACT = {
    "shard": [],
    "expert": [EXPERT],
    "expert, on two nodes": [EXPERT, "parallel.expert_ranks_per_node=1"],
    "replicate": [REPLICATE],
    "context": ["parallel.context=2"],
    "expert, recomputed, two micro-batches": [
        EXPERT,
        "train.activation_checkpointing=full",
        "train.gradient_accumulation_steps=2",
    ],
    "states on the CPU": [EXPERT, "parallel.cpu_offload=true"],
}
# Relative to the losses of one GPU in fp32.
CLOSE = {
    "bf16": ([EXPERT, "train.precision=bf16"], 5e-3),
    "bf16, compiled": ([EXPERT, "train.precision=bf16", "train.compile=true"], 5e-3),
    "bf16 in the sums of shards": (["communication.reduce_dtype=bf16"], 5e-3),
    "int8 between replicas": ([REPLICATE, "communication.replicate=int8"], 5e-3),
    "fp8 between replicas": ([REPLICATE, "communication.replicate=fp8"], 1e-2),
}


@pytest.fixture(scope="module")
def run(new_job, tmp_path_factory):
    """Runs a job by name with overrides, on two GPUs unless told otherwise."""
    folder = tmp_path_factory.mktemp("gpus")

    def start(name, overrides, *, ranks=2, before=None):
        job = new_job(folder / name.replace(" ", "-"))
        if before is not None:
            before(job)
        ended = job.run(*(part for one in overrides for part in ("--set", one)), ranks=ranks)
        assert ended.returncode == 0, f"{name}: {ended.stdout[-3000:]}{ended.stderr[-3000:]}"
        return job

    return start


@pytest.fixture(scope="module")
def one(run):
    return run("one", [], ranks=1)


@pytest.mark.parametrize("name", EXACT)
def test_an_axis_of_two_changes_no_figure(run, one, name):
    job = run(name, EXACT[name])
    for ours, reference in zip(job.metrics, one.metrics, strict=True):
        for key in {"loss", "mtp_loss", "balance_loss", "grad_norm", "heldout_loss"} & reference.keys():
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), key


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["shard", "expert, recomputed, two micro-batches", "replicate", "context"])
def test_parameters_that_stay_gathered_change_no_bit(run, name, precision):
    wide = ["model.hidden_size=128", "model.moe_intermediate_size=128"] if precision == "fp8" else []
    flags = [*EXACT[name], *wide, f"train.precision={precision}"]
    anew = run(f"{name} {precision}", flags)
    kept = run(f"{name} {precision} kept", [*flags, "parallel.reshard_after_forward=false"])
    assert kept.losses == anew.losses


@pytest.mark.parametrize("name", CLOSE)
def test_fewer_bits_stay_close(run, one, name):
    overrides, tolerance = CLOSE[name]
    assert run(name, overrides).losses == pytest.approx(one.losses, rel=tolerance)


def test_a_checkpoint_of_two_goes_on_at_two_and_at_one(run):
    whole = run("whole", [EXPERT])

    def at_step_8(job):
        shutil.copytree(whole.directory / "train", job.directory / "train")
        shutil.rmtree(job.checkpoint(12))

    for ranks, overrides in ((2, [EXPERT]), (1, [])):
        job = run(f"resumed at {ranks}", overrides, ranks=ranks, before=at_step_8)
        assert job.losses == pytest.approx(whole.losses, rel=1e-5)


def test_adapters_train_on_two(run, one):
    """The frozen base stays out of the gradients' sums, whose ranks agree."""
    export(str(one.directory), dtype=torch.float32)
    lora = ["lora={rank: 4}", "train.steps=6", f"init_from={one.directory / 'export'}"]
    alone = run("adapters on one", lora, ranks=1)
    assert run("adapters on two", lora).losses == pytest.approx(alone.losses, rel=1e-5)
