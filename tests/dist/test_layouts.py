"""Any layout of the ranks trains the same model: the losses, norms and weights of one rank, whatever the axes."""

import pytest
import torch

from cherry.export import export
from model.weights import load_pretrained

pytestmark = pytest.mark.slow

FIVE = ["train.steps=5", "checkpoint.every_steps=5"]
TWO_EXPERTS = ["model.n_routed_experts=2", "model.n_group=1", "model.num_experts_per_tok=1"]
FULL = "train.activation_checkpointing=full"
REFERENCES = {"one rank": (1, []), "one rank, two experts": (1, TWO_EXPERTS)}
LAYOUTS = {
    "shard 2": (2, []),
    "expert 2": (2, ["parallel.expert=2"]),
    "shard 2 x expert 2": (4, ["parallel.expert=2"]),
    "replicate 2 x shard 2": (4, ["parallel.replicate=2"]),
    "replicate 2 x expert 2, recomputed": (4, ["parallel.replicate=2", "parallel.expert=2", FULL]),
    "expert 4, two micro-batches": (4, ["parallel.expert=4", "train.gradient_accumulation_steps=2"]),
    "expert 2, kept until backward, on the CPU": (
        2,
        ["parallel.expert=2", "parallel.reshard_after_forward=false", "parallel.cpu_offload=true"],
    ),
}
# One expert a rank of the expert axis, which two ranks share: cut by width, as 256 experts on 2,048 ranks are.
TWO_EXPERT_LAYOUTS = {"shard 2 x expert 2, cut by width": (4, [*TWO_EXPERTS, "parallel.expert=2"])}


def weights(job):
    """The newest checkpoint's, by way of its export: put together from every rank's shards."""
    export(str(job.directory), dtype=torch.float32)
    return load_pretrained(str(job.directory / "export"), dtype=torch.float32).state_dict()


def differences(job, reference):
    """Every figure of a job that is off by more than 1e-5."""
    for ours, theirs in zip(job.metrics, reference.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for key in {"loss", "mtp_loss", "balance_loss", "grad_norm", "heldout_loss"} & theirs.keys():
            if ours[key] != pytest.approx(theirs[key], rel=1e-5):
                yield f"step {ours['step']}: {key} {ours[key]}, not {theirs[key]}"
    expected = weights(reference)
    for name, value in weights(job).items():
        if not (off := float((value - expected[name]).abs().max())) < 1e-5:
            yield f"{name} is off by {off}"


def test_every_layout_of_the_ranks_trains_the_same_model(train_jobs):
    wanted = {**REFERENCES, **LAYOUTS, **TWO_EXPERT_LAYOUTS}
    jobs = train_jobs({name: (ranks, [*flags, *FIVE]) for name, (ranks, flags) in wanted.items()})
    wrong = {name: list(differences(jobs[name], jobs["one rank"])) for name in LAYOUTS}
    wrong |= {name: list(differences(jobs[name], jobs["one rank, two experts"])) for name in TWO_EXPERT_LAYOUTS}
    assert wrong == dict.fromkeys(wrong, [])
