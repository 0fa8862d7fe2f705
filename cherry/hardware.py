"""Owns what a plan knows of machines: memory, arithmetic, links and how much of each a program reaches.

It knows nothing of models or layouts. Every figure has its source beside it; what was measured on one H200 is taken as
the same share of the data sheet's figure on other GPUs, which no measurement here has shown.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator, or the CPU of a laptop, by its data sheet; rates are a second's."""

    name: str
    memory_bytes: int
    """What torch reports as the device's total memory."""
    flops: dict[str, float]
    """Dense peak by precision: `fp32`, `bf16`, `fp8`."""
    memory_rate: float
    """Bytes read or written."""
    link_rate: float
    """Bytes to other GPUs of the node, one direction."""
    network_rate: float
    """Bytes to other nodes, one direction: this GPU's own adapter."""
    host_rate: float = 50e9
    """Bytes to the CPU's memory, one direction: PCIe 5.0 x16 carries 63e9, a pinned copy about 50e9."""
    shared_memory: bool = False
    """The machine's memory is the programs' too: a CPU."""
    without_kernels: tuple[str, ...] = ()
    """Precisions that it has, and for which the engine has no kernels on it."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """What the engine can compute in."""
        return tuple(name for name in self.flops if name not in self.without_kernels)


# NVIDIA's data sheets, SXM modules: H100 and H200 989.4e12 (bf16), 1978.9e12 (fp8), 67e12 (fp32); 3.35e12 and 4.8e12
# bytes/s of memory; NVLink 900e9 both ways. H800 has their arithmetic and memory with NVLink 400e9 both ways
# (DeepSeek-V3, arXiv 2412.19437, section 3.1 and 3.2.2: 160e9 reached one way, 50e9 of InfiniBand a GPU). B200:
# 2250e12, 4500e12, 75e12; 7.7e12 bytes/s; NVLink 1800e9. Each node of eight has a 400 Gbit/s adapter a GPU (DGX H100,
# DGX H200 and DGX B200 user guides). Memory is what torch.cuda.get_device_properties tells: 79.1, 139.8 and 178.4 GiB.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "H100",
            int(79.1 * GIB),
            {"fp32": 67e12, "bf16": 989.4e12, "fp8": 1978.9e12},
            memory_rate=3.35e12,
            link_rate=450e9,
            network_rate=50e9,
        ),
        Gpu(
            "H800",
            int(79.1 * GIB),
            {"fp32": 67e12, "bf16": 989.4e12, "fp8": 1978.9e12},
            memory_rate=3.35e12,
            link_rate=200e9,
            network_rate=50e9,
        ),
        Gpu(
            "H200",
            int(139.8 * GIB),
            {"fp32": 67e12, "bf16": 989.4e12, "fp8": 1978.9e12},
            memory_rate=4.8e12,
            link_rate=450e9,
            network_rate=50e9,
        ),
        Gpu(
            "B200",
            int(178.4 * GIB),
            {"fp32": 75e12, "bf16": 2250e12, "fp8": 4500e12},
            memory_rate=7.7e12,
            link_rate=900e9,
            network_rate=50e9,
            without_kernels=("fp8",),  # those of blocks of 128 are Hopper's
        ),
        # Two cores at 3 GHz with AVX2 (two fused multiply-adds of eight floats a cycle) are 192e9; dual-channel
        # DDR4-3200 moves 51e9 bytes/s. Links are gloo over the loopback interface.
        Gpu(
            "laptop",
            16 * GIB,
            {"fp32": 192e9},
            memory_rate=51e9,
            link_rate=2e9,
            network_rate=1e8,
            host_rate=51e9,
            shared_memory=True,
        ),
    )
}


@dataclass(frozen=True)
class Reach:
    """How much of a data sheet's figures programs reach."""

    matmul: dict[str, float]
    """Share of the peak of a matmul without bounds, by precision; fitted with `matmul_half`."""
    matmul_half: dict[str, float]
    """Harmonic mean of a matmul's three sizes at which it reaches half of that share."""
    attention_forward: float
    attention_backward: float
    memory: float
    link: float
    network: float
    """Of collectives in a ring."""
    exchange: float
    """Of an all-to-all's share that leaves the node."""
    exchange_once: float
    """Of the same where a token leaves for each node once: DeepEP's README, EP 64 on H800, 45e9 of 50e9."""
    layer_s: float
    """Host time to queue one layer's kernels, forward and backward: the floor of a step of tiny layers."""
    step_s: float
    """Of a step in which the device waits for the host: loss and norm are judged before the optimizer runs."""


# One H200, torch 2.11, 2026-11-24/25 (benchmarks/results/step_parts.jsonl and docs/decisions.md): matmul of 8192^3
# 790e12 and the head's (16,384 x 102,400 x 2,048) 757e12, from which share and half follow, and which give the grouped
# matmuls' 608e12 (1,536 rows an expert) within 5 %; cuDNN attention of 192/128 heads 535e12 and 406e12; a copy 4.16e12
# of 4.8e12. A step of the tiny preset's four layers takes 16.5 ms, all of it the host's; the 3.43 B step's parts add up
# to 165.9 of 172.7 ms. fp8 with a scale every 128 numbers, whose sums CUDA cores promote, over the three passes:
# 1,044e12 to 1,083e12 on dense shapes where bf16 reaches 758e12 to 784e12, grouped 1,033e12 (gate and up) and 990e12
# (down), within 3 % of share and half here (benchmarks/results/fp8_matmuls.jsonl, 2026-11-27).
# Links: an all-reduce of 1 GiB over the 8 H100 of a node had 361e9 of 450e9 bytes/s,
# over 4 of them 355e9 (2026-11-13). Shares of adapters are assumed, as no cluster of several nodes was measured here:
# 0.8 in a ring, 0.7 in an all-to-all, in which every pair of GPUs has a message of its own.
GPU_REACH = Reach(
    matmul={"fp32": 0.90, "bf16": 0.90, "fp8": 0.555},
    matmul_half={"fp32": 250.0, "bf16": 1000.0, "fp8": 140.0},
    attention_forward=0.54,
    attention_backward=0.41,
    memory=0.87,
    link=0.80,
    network=0.80,
    exchange=0.70,
    exchange_once=0.90,
    layer_s=2.4e-3,
    step_s=6.8e-3,
)
# Chosen so that a step of the tiny preset takes what it took on two cores, 103 ms (benchmarks/results/
# flow_overhead.jsonl). A plan for a laptop is a rough one.
CPU_REACH = Reach(
    matmul={"fp32": 0.9},
    matmul_half={"fp32": 60.0},
    attention_forward=0.5,
    attention_backward=0.4,
    memory=0.8,
    link=0.5,
    network=0.5,
    exchange=0.5,
    exchange_once=0.5,
    layer_s=10e-3,
    step_s=5e-3,
)
# Ring latency a hop, NCCL's own tuning table (src/graph/tuning.cc, Ring/Simple): inside a node and between nodes.
LINK_HOP_S, NETWORK_HOP_S = 3.4e-6, 14e-6
# NCCL's launch of a collective, its tuning table's base latency of Ring/Simple.
COLLECTIVE_S = 8.4e-6

# CUDA's context, cuBLAS' and cuDNN's workspaces and their handles: what nvidia-smi shows over what torch has reserved.
# Assumed: about 0.5 GiB of context on Hopper and 32 MiB of cuBLAS workspace a stream.
CONTEXT_BYTES = int(0.75 * GIB)
# cuBLAS' workspace among torch's tensors: torch's 32 MiB on Hopper, for the forward and the backward thread each.
WORKSPACE_BYTES = 2 * 32 * 2**20
# A process that trains on a CPU, without its tensors: 0.31 GiB after the imports (torch 2.13, 2026-11-26); the rest,
# for threads, gloo and what the allocator keeps, is assumed.
PROCESS_BYTES = int(0.5 * GIB)
# NCCL's buffers a communicator: channels of NCCL_BUFFSIZE (4 MiB by its documentation), for sending and receiving.
NCCL_CHANNELS, NCCL_BUFFER_BYTES = 16, 4 * 2**20
# What the allocator reserves beyond the peak, as a share of what changes size within a step. One H200, 2026-11-26: 0.02
# to 0.134 in 12 configurations in bf16 (reserved_gib and peak_gib in benchmarks/results/plan_gpu.jsonl). In fp32, with
# 100 GiB free beside it, 0.79: not all that it reserves is needed.
FRAGMENTATION = 0.135
# Of a laptop's memory that other programs hold: an operating system and a browser. Assumed.
OTHER_PROGRAMS = 0.4


def reach_of(gpu: Gpu) -> Reach:
    """What programs reach on this device."""
    return CPU_REACH if gpu.shared_memory else GPU_REACH


def usable_bytes(gpu: Gpu, ranks: int) -> int:
    """Memory that a rank's tensors, communication buffers and fragmentation may take together.

    Args:
        ranks: of the same node, which share a CPU's memory.
    """
    if gpu.shared_memory:
        return int(gpu.memory_bytes * (1 - OTHER_PROGRAMS)) // ranks - PROCESS_BYTES
    return gpu.memory_bytes - CONTEXT_BYTES
