"""Hardware figures: peak FLOP/s, memory and links of each accelerator by its data sheet, and the achieved efficiency.

The one table of devices: plans and the trainer's MFU both read it. The efficiencies were measured on one H200 and are
taken as the same fraction of the data sheet's figure on other GPUs, which no measurement here has shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator, or the CPU of a laptop, by its data sheet; rates are per second."""

    name: str
    """Name in cluster specs; each of its words occurs in the driver's name of the device."""
    memory_bytes: int
    """Total device memory in bytes, as torch reports it."""
    flops: dict[str, float]
    """Dense peak FLOP/s by precision: `fp32`, `bf16`, `fp8`."""
    memory_rate: float
    """Bytes/s read from or written to device memory."""
    link_rate: float
    """Bytes/s to other GPUs of the node, one direction."""
    network_rate: float
    """Bytes/s to other nodes, one direction: this GPU's own adapter."""
    compute_capability: tuple[int, int] | None = None
    """CUDA compute capability, which tells the number formats of its tensor cores; `None` for a CPU."""
    host_rate: float = 50e9
    """Bytes/s to host memory, one direction: PCIe 5.0 x16 carries 63e9, a pinned copy about 50e9."""
    shared_memory: bool = False
    """Whether the device computes in host memory: a CPU."""
    without_kernels: tuple[str, ...] = ()
    """Precisions of the hardware for which the engine has no kernels on it."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that the engine can compute in."""
        return tuple(name for name in self.flops if name not in self.without_kernels)


# NVIDIA's data sheets. fp32 is that of CUDA cores: matmuls take them unless TensorFloat32 is asked for.
# H100, H200 SXM (H100 and H200 data sheets): 989.4e12 (bf16), 1978.9e12 (fp8), 67e12 (fp32); 3.35e12 and 4.8e12 bytes/s
# of memory; NVLink 900e9 both ways. H100 PCIe (same sheet): 756e12, 1513e12, 51e12; 2.0e12; no NVSwitch, so PCIe 5.0.
# H800 has the H100's arithmetic and memory with NVLink 400e9 both ways (DeepSeek-V3, arXiv 2412.19437, section 3.1 and
# 3.2.2: 160e9 reached one way, 50e9 of InfiniBand a GPU).
# B200 as in HGX and DGX B200 (NVIDIA Blackwell data sheet, column HGX B200): 2250e12, 4500e12, 75e12; 7.7e12 bytes/s;
# NVLink 1800e9. The sheet's 80e12 (fp32) is the GPU of a GB200 NVL72.
# A100 SXM (A100 data sheet): 312e12, 19.5e12, no fp8; 2.039e12 (80 GB) and 1.555e12 (40 GB) bytes/s; NVLink 600e9;
# PCIe 4.0 x16 carries 31.5e9, a pinned copy about 25e9.
# Each node of eight has a 400 Gbit/s adapter a GPU (DGX H100, H200 and B200 user guides), of A100 a 200 Gbit/s one (DGX
# A100). Compute capabilities are NVIDIA's list of CUDA GPUs. Memory is what torch.cuda.get_device_properties reports:
# 79.1, 139.8 and 178.4 GiB; 39.4 GiB of 40 GB.
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
            compute_capability=(9, 0),
        ),
        Gpu(
            "H100 PCIe",
            int(79.1 * GIB),
            {"fp32": 51e12, "bf16": 756e12, "fp8": 1513e12},
            memory_rate=2.0e12,
            link_rate=63e9,
            network_rate=50e9,
            compute_capability=(9, 0),
        ),
        Gpu(
            "H800",
            int(79.1 * GIB),
            {"fp32": 67e12, "bf16": 989.4e12, "fp8": 1978.9e12},
            memory_rate=3.35e12,
            link_rate=200e9,
            network_rate=50e9,
            compute_capability=(9, 0),
        ),
        Gpu(
            "H200",
            int(139.8 * GIB),
            {"fp32": 67e12, "bf16": 989.4e12, "fp8": 1978.9e12},
            memory_rate=4.8e12,
            link_rate=450e9,
            network_rate=50e9,
            compute_capability=(9, 0),
        ),
        Gpu(
            "B200",
            int(178.4 * GIB),
            {"fp32": 75e12, "bf16": 2250e12, "fp8": 4500e12},
            memory_rate=7.7e12,
            link_rate=900e9,
            network_rate=50e9,
            compute_capability=(10, 0),
            without_kernels=("fp8",),  # those of blocks of 128 are Hopper's
        ),
        Gpu(
            "A100",
            int(79.1 * GIB),
            {"fp32": 19.5e12, "bf16": 312e12},
            memory_rate=2.039e12,
            link_rate=300e9,
            network_rate=25e9,
            compute_capability=(8, 0),
            host_rate=25e9,
        ),
        Gpu(
            "A100 40GB",
            int(39.4 * GIB),
            {"fp32": 19.5e12, "bf16": 312e12},
            memory_rate=1.555e12,
            link_rate=300e9,
            network_rate=25e9,
            compute_capability=(8, 0),
            host_rate=25e9,
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


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that a driver calls `device_name`, like `NVIDIA H100 80GB HBM3`; `None` for one that is not listed.

    Words are compared whole, so that a GH200 is no H200; of several matches the one with most words is taken.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    found = [gpu for gpu in GPUS.values() if not gpu.shared_memory and words.issuperset(gpu.name.upper().split())]
    return max(found, key=lambda gpu: len(gpu.name.split()), default=None)


@dataclass(frozen=True)
class Efficiency:
    """Achieved efficiency: fractions of the data sheet's figures that programs reach, and fixed host times."""

    matmul: dict[str, float]
    """Fraction of peak FLOP/s of an unboundedly large matmul, by precision; fitted with `matmul_half`."""
    matmul_half: dict[str, float]
    """Harmonic mean of a matmul's three sizes at which it reaches half of that fraction."""
    attention_forward: float
    """Fraction of peak FLOP/s of attention's forward pass."""
    attention_backward: float
    """Fraction of peak FLOP/s of attention's backward pass."""
    memory: float
    """Fraction of memory bandwidth of a large copy."""
    link: float
    """Fraction of the intra-node links in a ring."""
    network: float
    """Fraction of the network adapters in a ring."""
    fsdp_copies: float
    """Fraction of a large copy's rate in FSDP2's casts and copies to and from its buffers, on several ranks."""
    beside_nccl: float
    """Seconds that matmuls lose to each second of NCCL's kernels in a node, which take SMs from them."""
    all_to_all: float
    """Fraction of the network adapters in an NCCL all-to-all across nodes."""
    fused_all_to_all: float
    """Fraction of the network adapters in kernels that send a token to each node once: DeepEP's README, EP 64 on H800,
    45e9 of 50e9."""
    layer_s: float
    """Host time to queue one layer's kernels, forward and backward: the floor of a step of tiny layers."""
    step_s: float
    """Seconds of a step in which the device waits for the host: loss and norm are checked before the optimizer runs."""


# One H200, torch 2.11, 2026-11-24/25 (benchmarks/results/step_parts.jsonl and docs/decisions.md): matmul of 8192^3
# 790e12 and the head's (16,384 x 102,400 x 2,048) 757e12, from which fraction and half follow, and which give the
# grouped matmuls' 608e12 (1,536 rows an expert) within 5 %; cuDNN attention of 192/128 heads 535e12 and 406e12; a copy
# 4.16e12 of 4.8e12. A step of the tiny preset's four layers takes 16.5 ms, all of it the host's; the 3.43 B step's
# parts add up to 165.9 of 172.7 ms. fp8 with a scale every 128 numbers, whose sums CUDA cores promote, over the three
# passes: 1,044e12 to 1,083e12 on dense shapes where bf16 reaches 758e12 to 784e12, grouped 1,033e12 (gate and up) and
# 990e12 (down), within 3 % of fraction and half here (benchmarks/results/fp8_matmuls.jsonl, 2026-11-27).
# Links: an all-reduce of 1 GiB over the 8 H100 of a node had 361e9 of 450e9 bytes/s, over 4 of them 355e9 (2026-11-13).
# FSDP2's copies and what matmuls lose beside NCCL: fitted to the steps of two H200 that gather in every pass
# (benchmarks/results/multi_gpu.json, 2026-11-30).
# Fractions of adapters are assumed, as no cluster of several nodes was measured here: 0.8 in a ring, 0.7 in an
# all-to-all, in which every pair of GPUs has a message of its own.
GPU_EFFICIENCY = Efficiency(
    matmul={"fp32": 0.90, "bf16": 0.90, "fp8": 0.555},
    matmul_half={"fp32": 250.0, "bf16": 1000.0, "fp8": 140.0},
    attention_forward=0.54,
    attention_backward=0.41,
    memory=0.87,
    link=0.80,
    network=0.80,
    fsdp_copies=0.385,
    beside_nccl=0.45,
    all_to_all=0.70,
    fused_all_to_all=0.90,
    layer_s=2.4e-3,
    step_s=6.8e-3,
)
# Chosen so that a step of the tiny preset takes what it took on two cores, 103 ms (benchmarks/results/
# flow_overhead.jsonl). A plan for a laptop is a rough one.
CPU_EFFICIENCY = Efficiency(
    matmul={"fp32": 0.9},
    matmul_half={"fp32": 60.0},
    attention_forward=0.5,
    attention_backward=0.4,
    memory=0.8,
    link=0.5,
    network=0.5,
    fsdp_copies=1.0,
    beside_nccl=0.0,
    all_to_all=0.5,
    fused_all_to_all=0.5,
    layer_s=10e-3,
    step_s=5e-3,
)
# Ring latency per hop, NCCL's own tuning table (src/graph/tuning.cc, Ring/Simple): inside a node and between nodes.
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


def efficiency_of(gpu: Gpu) -> Efficiency:
    """Achieved efficiency on this device."""
    return CPU_EFFICIENCY if gpu.shared_memory else GPU_EFFICIENCY


def usable_bytes(gpu: Gpu, ranks: int) -> int:
    """Bytes that a rank's tensors, communication buffers and fragmentation may take together.

    Args:
        ranks: ranks of the node, which share a CPU's memory.
    """
    if gpu.shared_memory:
        return int(gpu.memory_bytes * (1 - OTHER_PROGRAMS)) // ranks - PROCESS_BYTES
    return gpu.memory_bytes - CONTEXT_BYTES
