"""Compressed gradient reduction: exact but for the residuals, bitwise equal on all ranks, and every byte counted."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from cherry.distributed.compression import CODECS, padded_chunk

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2 if torch.cuda.device_count() in (2, 3) else 4
SIZES = (1, 700, 4 * 256 * 3)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank saw."""
    directory = tmp_path_factory.mktemp("reductions")
    program = [str(ROOT / "tests" / "dist" / "reductions.py"), str(directory)]
    launch = [sys.executable, "-m", "cherry.launcher", f"--nproc_per_node={RANKS}"]
    ended = subprocess.run(launch + program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [torch.load(directory / f"rank-{rank}.pt") for rank in range(RANKS)]


def totals(seen, name, size):
    """Per step: exact sum, result, and the sum of all ranks' residuals, in float64."""
    steps = zip(*(rank["flat"][name, size]["steps"] for rank in seen), strict=True)
    for ranks in steps:
        exact = sum(gradient.double() for gradient, _, _ in ranks)
        yield exact, ranks[0][1].double(), sum(left.double() for _, _, left in ranks)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CODECS)
def test_every_rank_has_the_same_bits_and_the_sum_of_all_steps_is_exact(seen, name, size):
    for steps in zip(*(rank["flat"][name, size]["steps"] for rank in seen), strict=True):
        for _, result, _ in steps[1:]:
            assert torch.equal(result, steps[0][1])
    wanted = sent = torch.zeros(size, dtype=torch.float64)
    for exact, result, left in totals(seen, name, size):
        wanted, sent = wanted + exact, sent + result
        # Rounding of fp32 alone: a few sums a step, of values below 2 x 4 ranks x 6 and their running total.
        torch.testing.assert_close(sent + left, wanted, rtol=1e-6, atol=3e-5)


@pytest.mark.parametrize(("name", "half_step"), [("int8", 1 / 254), ("fp8", 2**-4)])
def test_residuals_never_exceed_one_step_s_rounding(seen, name, half_step):
    size = SIZES[-1]
    before = [torch.zeros(size) for _ in seen]
    for step in range(16):
        rows = [rank["flat"][name, size]["steps"][step] for rank in seen]
        largest = sum((row[0] + left).abs().max() for row, left in zip(rows, before, strict=True))
        before = [row[2] for row in rows]
        left = sum(row[2].abs() for row in rows)
        # Each rank rounds its own, and an owner the sum.
        assert left.max() <= (largest + rows[0][1].abs().max()) * half_step * (1 + 1e-5)
        assert left.max() > 0


@pytest.mark.parametrize("name", CODECS)
def test_a_value_that_is_not_finite_shows_on_every_rank_and_is_not_kept(seen, name):
    for rank in seen:
        result, left = rank["flat"][name, "broken"]
        assert not result[3].isfinite()
        assert not result[300].isfinite()
        assert result[512:].isfinite().all()
        assert left.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "bits"), [("bf16", 16), ("int8", 8.125), ("fp8", 8.125)])
def test_bytes_of_a_flat_sum(seen, name, bits, size):
    fp32 = 4 * size * (RANKS - 1) // RANKS
    sent = (RANKS - 1) * padded_chunk(size, RANKS) * bits / 8
    assert seen[0]["flat"][name, size]["counted"] == [("all_to_all", sent, fp32), ("all_gather", sent, fp32)]


CONFIGS = ["fp32", "shard bf16", "replicate bf16", "replicate int8", "replicate fp8", "both"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_counted_bytes_are_those_that_the_dispatcher_sees(seen, name):
    for rank in seen:
        row = rank["model"][name]
        by_kind = Counter()
        for key, sent in row["totals"]["by_collective"].items():
            by_kind[key.partition(".")[2]] += sent
        assert by_kind == Counter(row["wire"])
        assert row["totals"]["total"] == sum(by_kind.values())


def plain_gradients(micro_batches):
    """Those of one process that has every rank's rows."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(37, 51), nn.Tanh(), nn.Linear(51, 1, bias=False))
    for part in range(micro_batches):
        for rank in range(RANKS):
            generator = torch.Generator().manual_seed(10 * part + rank)
            network(torch.randn(8, 37, generator=generator)).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize(("key", "micro_batches"), [("one", 1), ("gradients", 3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_a_sharded_model(seen, name, key, micro_batches):
    # Rounding once on the shard axis: 2^-8 for bf16. Twice between replicas: 2^-8, a 254th or 2^-4 of the block's
    # largest, which may lie in the next parameter.
    tolerance = {"fp32": 1e-6, "shard bf16": 2**-8, "replicate bf16": 2**-7, "replicate fp8": 2**-3}.get(name, 0.04)
    for parameter, wanted in plain_gradients(micro_batches).items():
        for rank in seen:
            found = rank["model"][name][key][parameter]
            assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), parameter
            assert torch.equal(found, seen[0]["model"][name][key][parameter])


@pytest.mark.parametrize("name", ["replicate int8", "replicate fp8"])
def test_gradients_and_residuals_are_the_exact_sum_and_survive_a_checkpoint(seen, name):
    row = seen[0]["model"][name]
    for parameter, wanted in plain_gradients(3).items():
        left = row["residuals"][parameter]
        assert left.abs().max() > 0
        torch.testing.assert_close(row["gradients"][parameter] + left.sum(0), wanted, rtol=1e-5, atol=1e-4)
        assert torch.equal(row["restored"][parameter], left)
    assert not seen[0]["model"]["replicate bf16"]["residuals"]
