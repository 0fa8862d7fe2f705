"""FSDP, HSDP, expert and context parallel layouts train the same model: losses, norms and weights of one rank.

A checkpoint of one layout resumes in any other.
"""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from base.config import load
from cherry.export import export
from cherry.job_config import JobConfig
from model.transformer import DeepseekV3
from model.weights.hf_names import state_to_hf
from model.weights.pretrained import load_pretrained, save_pretrained

pytestmark = pytest.mark.slow


@dataclass
class Wanted:
    """One run for `train_jobs`."""

    name: str
    ranks: int
    flags: list[str]
    resume_from: tuple[str, int] | None = None
    """The job and step whose checkpoint it starts from; it saves what it read before it goes on."""
    largest: bool = False
    """Write down the largest tensor of building the model."""


EXPERT, CONTEXT, REPLICATE = "parallel.expert=2", "parallel.context=2", "parallel.replicate=2"
NODES = ["parallel.expert=4", "parallel.expert_ranks_per_node=2"]
RECOMPUTE = "train.activation_checkpointing=full"
LAYOUTS = [
    Wanted("one rank", 1, []),
    Wanted("shard 2", 2, []),
    Wanted("expert 2", 2, [EXPERT]),
    Wanted("shard 2 x expert 2", 4, [EXPERT]),
    Wanted("replicate 2 x shard 2", 4, [REPLICATE]),
    Wanted("replicate 2 x expert 2, recomputed", 4, [REPLICATE, EXPERT, RECOMPUTE]),
    Wanted("expert 4 on two nodes, two micro-batches", 4, [*NODES, "train.gradient_accumulation_steps=2"]),
    Wanted("context 2, two micro-batches", 2, [CONTEXT, "train.gradient_accumulation_steps=2"]),
    Wanted("context 2 x expert 2, recomputed", 4, [CONTEXT, EXPERT, RECOMPUTE]),
    Wanted(
        "kept until backward, on the CPU",
        2,
        [EXPERT, "parallel.reshard_after_forward=false", "parallel.cpu_offload=true"],
    ),
]
# One expert for each expert parallel rank, sharded over two ranks: on dimension 1, as 256 experts on 2,048 ranks are.
# Weights are loaded, not initialized: each rank reads its box of every stored tensor.
TWO_EXPERTS = ["model.n_routed_experts=2", "model.n_group=1", "model.num_experts_per_tok=1"]
LOADED = [
    Wanted("one rank, from weights", 1, TWO_EXPERTS),
    Wanted("replicate 2 x expert 2, from weights", 4, [*TWO_EXPERTS, REPLICATE, EXPERT]),
    Wanted("sharded by width, from weights", 4, [*TWO_EXPERTS, EXPERT]),
    Wanted("sharded by width, no expert parallel, from weights", 4, TWO_EXPERTS),
]
BF16 = Wanted("in bf16", 2, [EXPERT, "train.precision=bf16"])
WIDE = ["model.hidden_size=128", "model.moe_intermediate_size=128", EXPERT]
# Expert parallel over two ranks, whose rows arrive in expert order; and experts sharded by FSDP, computed twice.
FP8 = [
    Wanted("wide, in bf16", 2, [*WIDE, "train.precision=bf16"]),
    Wanted("wide, in fp8", 2, [*WIDE, "train.precision=fp8"]),
    Wanted("wide, in fp8, no expert parallel, recomputed", 2, [*WIDE[:-1], "train.precision=fp8", RECOMPUTE]),
]
# Parameters that stay gathered from step to step, beside FSDP2's own way: dense ones over two and over four ranks,
# experts by number, by width and over replicas. The first checkpoint comes in the middle.
KEPT = "parallel.reshard_after_forward=false"
KEPT_AS = [
    ("shard 2", 2, []),
    ("expert 2, two micro-batches", 2, [EXPERT, "train.gradient_accumulation_steps=2"]),
    ("replicate 2 x expert 2, recomputed", 4, [REPLICATE, EXPERT, RECOMPUTE]),
    ("replicate 2, two micro-batches", 4, [REPLICATE, "train.gradient_accumulation_steps=2"]),
    ("by width", 4, TWO_EXPERTS),
    ("muon", 2, ["train.optimizer=muon", EXPERT]),
]
IN_BF16 = ["train.precision=bf16", "checkpoint.every_steps=2"]
GATHERED = [Wanted(f"{name}, gathered anew", ranks, [*IN_BF16, *flags]) for name, ranks, flags in KEPT_AS]
STAYING = [Wanted(f"{name}, kept", ranks, [*IN_BF16, *flags, KEPT]) for name, ranks, flags in KEPT_AS]
KEPT_RESUMED = [replace(job, name=f"{job.name}, resumed", resume_from=(job.name, 2)) for job in STAYING[2:4]]
FP8_KEPT = Wanted("wide, in fp8, kept", 2, [*WIDE, "train.precision=fp8", KEPT])
BUILT = Wanted("built", 4, [EXPERT], largest=True)
# 12 sequences a step divide by every number of ranks.
STEPS = ["train.batch_size=12", "train.steps=4", "checkpoint.every_steps=2"]
RESUMED = [
    Wanted("saved", 4, [*STEPS, EXPERT]),
    Wanted("on 4", 4, [*STEPS, EXPERT], ("saved", 2)),
    Wanted("on 2", 2, [*STEPS, EXPERT], ("saved", 2)),
    Wanted("on 3", 3, STEPS, ("saved", 2)),
    Wanted("on 1", 1, STEPS, ("saved", 2)),
]
# By Muon: rows of matrices that two, three (unevenly, and across fused halves) or four ranks share, experts whole on a
# rank, and experts cut by width.
TWELVE = ["train.optimizer=muon", "train.batch_size=12", "train.steps=4", "checkpoint.every_steps=2"]
MUON = [
    Wanted("muon, one rank", 1, TWELVE),
    Wanted("muon, shard 2", 2, TWELVE),
    Wanted("muon, shard 3", 3, TWELVE),
    Wanted("muon, expert 2", 2, [*TWELVE, EXPERT]),
    Wanted("muon, shard 2 x expert 2, recomputed", 4, [*TWELVE, EXPERT, RECOMPUTE]),
    Wanted("muon, replicate 2 x shard 2", 4, [*TWELVE, REPLICATE]),
    Wanted("muon, replicate 2 x expert 2", 4, [*TWELVE, REPLICATE, EXPERT, "train.gradient_accumulation_steps=3"]),
    Wanted("muon, context 2 x expert 2", 4, [*TWELVE, CONTEXT, EXPERT]),
]
MUON_BY_WIDTH = [
    Wanted("muon, two experts, one rank", 1, [*TWELVE, *TWO_EXPERTS]),
    Wanted("muon, two experts by width", 4, [*TWELVE, *TWO_EXPERTS]),
    Wanted("muon, two experts by width and expert 2", 4, [*TWELVE, *TWO_EXPERTS, EXPERT]),
]
MUON_RESUMED = [
    Wanted("muon, on 4", 4, [*TWELVE, EXPERT], ("muon, shard 2 x expert 2, recomputed", 2)),
    Wanted("muon, on 3", 3, TWELVE, ("muon, shard 2 x expert 2, recomputed", 2)),
    Wanted("muon, on 1", 1, TWELVE, ("muon, shard 2 x expert 2, recomputed", 2)),
]


@pytest.fixture(scope="module")
def muon_jobs(train_jobs):
    return train_jobs([*MUON, *MUON_BY_WIDTH, *MUON_RESUMED])


@pytest.fixture(scope="module")
def jobs(train_jobs, job_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    model = DeepseekV3(load(job_config, JobConfig, TWO_EXPERTS).model)
    model.init_weights(seed=7)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    tensors = (pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, model.config))
    save_pretrained(tensors, str(folder), model.config, dtype=torch.float32)
    five = ["train.steps=5", "checkpoint.every_steps=5"]
    short = [replace(job, flags=[*job.flags, *five]) for job in [*LAYOUTS, BF16, *FP8, FP8_KEPT, BUILT]]
    loaded = [replace(job, flags=[*job.flags, *five, f"init_from={folder}"]) for job in LOADED]
    return train_jobs([*short, *loaded, *RESUMED])


def state(job, step):
    """Tensors of a checkpoint by name, assembled from every rank's shards."""
    path = job.directory / "state.pt"
    dcp_to_torch_save(str(job.checkpoint(step)), str(path))
    found = torch.load(path, weights_only=False)
    return {f"{part} {name}": value for part in ("model", "optimizer") for name, value in found[part].items()}


def differences(job, reference):
    """Metrics and weights of a job that differ from the reference by more than 1e-5."""
    for ours, theirs in zip(job.metrics, reference.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for key in {"loss", "mtp_loss", "balance_loss", "grad_norm", "heldout_loss"} & theirs.keys():
            if ours[key] != pytest.approx(theirs[key], rel=1e-5):
                yield f"step {ours['step']}: {key} {ours[key]}, not {theirs[key]}"
    last = reference.metrics[-1]["step"]
    ours, theirs = state(job, last), state(reference, last)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.startswith("model ") and not (off := float((ours[name] - value).abs().max())) < 1e-5:
            yield f"{name} is off by {off}"


def test_every_layout_of_the_ranks_trains_the_same_model(jobs):
    wrong = {job.name: list(differences(jobs[job.name], jobs["one rank"])) for job in LAYOUTS[1:]}
    assert wrong == {key: [] for key in wrong}


def test_experts_in_bf16_follow_those_in_fp32(jobs):
    assert jobs["in bf16"].losses == pytest.approx(jobs["one rank"].losses, rel=5e-3)
    assert jobs["in bf16"].losses != pytest.approx(jobs["one rank"].losses, rel=1e-6)


def test_blocks_in_fp8_follow_those_in_bf16(jobs):
    bf16, *others = (jobs[job.name] for job in FP8)
    for job in others:
        assert job.losses == pytest.approx(bf16.losses, rel=5e-3)
        assert job.losses != pytest.approx(bf16.losses, rel=1e-6)
        assert job.metrics[-1]["heldout_loss"] == pytest.approx(bf16.metrics[-1]["heldout_loss"], rel=5e-3)


def test_fp8_weights_that_stay_on_two_ranks_are_those_that_are_quantized_anew(jobs):
    assert jobs["wide, in fp8, kept"].losses == pytest.approx(jobs["wide, in fp8"].losses, rel=1e-3)


def test_parameters_that_stay_gathered_train_as_those_that_are_gathered_anew(train_jobs):
    """A CPU's own AdamW sums in another order than the one that writes copies: the last bit of bf16 may differ."""
    four = ["train.steps=4"]
    jobs = train_jobs([replace(job, flags=[*four, *job.flags]) for job in (*GATHERED, *STAYING, *KEPT_RESUMED)])
    for anew, kept in zip(GATHERED, STAYING, strict=True):
        ours, theirs = (jobs[job.name].metrics for job in (kept, anew))
        for key in ("loss", "mtp_loss", "grad_norm", "heldout_loss"):
            pairs = [(one[key], other[key]) for one, other in zip(ours, theirs, strict=True) if key in other]
            assert pairs
            assert [one for one, _ in pairs] == pytest.approx([other for _, other in pairs], rel=2e-3), (kept.name, key)
        assert ours[0]["loss"] == theirs[0]["loss"]
        assert ours[0]["bytes_on_wire_total"] < theirs[0]["bytes_on_wire_total"], (
            "parameters once a step, gradients in bf16"
        )
    for job, whole in zip(KEPT_RESUMED, STAYING[2:4], strict=True):
        kept = {line["step"]: line for line in jobs[whole.name].metrics}
        ours = [line for line in jobs[job.name].metrics if line["step"] > 2]
        assert [line["step"] for line in ours] == [3, 4]
        for line in ours:
            for key in ("loss", "grad_norm", "bytes_on_wire_total"):
                assert line[key] == kept[line["step"]][key], (job.name, key)


def test_every_rank_reads_its_part_of_stored_weights_also_of_experts_cut_by_width(jobs):
    first, *others = (jobs[job.name] for job in LOADED)
    assert first.metrics[0]["loss"] > 1.05 * jobs["one rank"].metrics[0]["loss"]  # read: they are of another size
    assert [list(differences(job, first)) for job in others] == [[], [], []]


def test_nothing_of_the_full_model_is_ever_on_one_rank(jobs):
    """No tensor that building the model allocates is larger than the largest shard of a rank."""
    for rank in range(4):
        path = jobs["built"].directory / f"largest-{rank}.json"
        found = json.loads(path.read_text())
        assert 600 * 32 / 4 == found["held"] == found["made"], rank  # a quarter of the embedding


def test_a_checkpoint_of_four_ranks_goes_on_with_any_number(jobs):
    saved = state(jobs["saved"], 2)
    assert len(saved) > 100
    for name in ("on 4", "on 2", "on 3", "on 1"):
        read = state(jobs[name], 2)
        assert read.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(read[key], value) if isinstance(value, torch.Tensor) else read[key] == value, key
        assert [line["step"] for line in jobs[name].metrics] == [3, 4]
        if name == "on 4":
            assert jobs[name].losses == jobs["saved"].losses[2:]
        assert jobs[name].losses == pytest.approx(jobs["saved"].losses[2:], rel=1e-5)


def test_a_checkpoint_of_expert_parallel_ranks_is_exported_whole(jobs):
    job = jobs["shard 2 x expert 2"]
    export(str(job.directory), dtype=torch.float32)
    exported = load_pretrained(str(job.directory / "export"), dtype=torch.float32).state_dict()
    saved = state(job, 5)
    assert all(torch.equal(value, saved[f"model {name}"]) for name, value in exported.items())


def test_every_layout_of_the_ranks_trains_the_same_model_by_muon(muon_jobs):
    wrong = {job.name: list(differences(muon_jobs[job.name], muon_jobs[MUON[0].name])) for job in MUON[1:]}
    first = muon_jobs[MUON_BY_WIDTH[0].name]
    wrong |= {job.name: list(differences(muon_jobs[job.name], first)) for job in MUON_BY_WIDTH[1:]}
    assert wrong == {key: [] for key in wrong}


def test_momenta_of_four_ranks_go_on_with_any_number(muon_jobs):
    whole = muon_jobs["muon, shard 2 x expert 2, recomputed"]
    saved = state(whole, 2)
    momenta = [key for key in saved if key.endswith(".momentum_buffer")]
    assert len(momenta) > 20 and all(saved[key].any() for key in momenta)
    for job in MUON_RESUMED:
        resumed = muon_jobs[job.name]
        read = state(resumed, 2)
        assert read.keys() == saved.keys()
        assert [key for key in momenta if not torch.equal(read[key], saved[key])] == []
        assert resumed.losses == pytest.approx(whole.losses[2:], rel=1e-5)
