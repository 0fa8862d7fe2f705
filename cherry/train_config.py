"""Configuration of the optimization: the recipe, Muon, LoRA adapters and profiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from base.config import Problem, Section

# Rounding the moments to nearest costs nothing at 0.95 (loss -0.01 % against fp32) and 0.2 % at 0.99; stochastic
# rounding costs nothing at either. A second moment of noise is off by 0.01 % at 0.95, 0.5 % at 0.98, 4.5 % at 0.99, and
# at 0.998 no longer decays (7 M parameters, 600 steps, H100, 2026-11-25).
_BF16_MAX_BETA = 0.98


class ProfileConfig(Section):
    """Steps and ranks to profile with torch.profiler; the files go to `train/profile/` in the run directory."""

    steps: tuple[PositiveInt, PositiveInt]
    """First and last optimizer step to profile, counted from 1. Leave out the first steps, which compile and warm up; a
    trace grows by megabytes a step."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks to profile; the others run as always."""
    memory: bool = False
    """Record allocations too: a CUDA memory snapshot, or a timeline of allocated bytes where there is no GPU."""

    def problems(self) -> Iterator[Problem]:
        """Problems with an empty range of steps or an empty list of ranks."""
        if self.steps[0] > self.steps[1]:
            yield Problem("steps", "must be [first, last] with first <= last", list(self.steps))
        if not self.ranks:
            yield Problem("ranks", "must name at least one rank", [])


class MuonConfig(Section):
    """Options of Muon (Keller Jordan, 2024) as Moonlight trains with it (arXiv 2502.16982)."""

    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of the momentum."""
    nesterov: bool = True
    """Orthogonalize the gradient plus the decayed momentum (Nesterov), not the momentum alone."""
    newton_schulz_steps: PositiveInt = 5
    """Iterations that orthogonalize an update."""
    update_rms: PositiveFloat = 0.2
    """An update of an M x N matrix is scaled by this times sqrt(max(M, N)): its root mean square is then about that of
    AdamW's updates, so that learning_rate and weight_decay mean the same for both (section 2.2)."""


class TrainConfig(Section):
    """Optimization and loss. Defaults that do not depend on the model's size follow DeepSeek-V3, section 4.2."""

    steps: PositiveInt = 200
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Sequences per optimizer step, over all ranks and micro-batches."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step. More of them need less memory for activations."""
    learning_rate: PositiveFloat = 2.2e-4
    """Learning rate after the warm-up."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate that cosine and linear schedules end at, as a fraction of `learning_rate`."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of decoder blocks (attention, feed-forwards, experts) by Muon; the router, embedding,
    head, norms and the MTP module's projection stay with AdamW."""
    muon: MuonConfig = MuonConfig()
    """Options of Muon; ignored by `adamw`."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of AdamW's first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of AdamW's second moment."""
    optimizer_state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of AdamW's two moments and of Muon's momentum. bf16 saves 4 bytes a parameter with AdamW (DeepSeek-V3,
    section 3.3.3), 2 with Muon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    spike_sigma: PositiveFloat | None = 6.0
    """Spike guard: skip a step whose loss or gradient norm is this many standard deviations above the mean of the last
    128 steps, as OLMo 2 does; `null` skips only NaN and infinity. A skipped step counts; its data is not read again."""
    gradient_fingerprints: bool = False
    """Fingerprint each rank's gradients before they are reduced (one pass over them), so that corruption in a backward
    pass can be pinned on a rank; that in a forward pass always can. A step that the spike guard refuses is computed
    again: other bits from the same inputs are silent data corruption, and end the run with the host's name."""
    self_check_every_steps: PositiveInt | None = None
    """Steps between self-checks: a small workload with known bits on each rank's device; `null` makes none."""
    straggler_share: PositiveFloat | None = 0.1
    """Name a rank, with its host, whose own computation took this share longer in each of its last three reports than
    the median rank's in any of them: the others wait for it in every step. `null` measures none."""
    rank_report_every_s: PositiveFloat = 10.0
    """Seconds between two reports of each rank's pace, for stragglers and `cherry top`."""
    max_skipped_steps: PositiveInt = 10
    """Consecutive skipped steps that trigger `on_divergence`."""
    on_divergence: Literal["rollback", "stop"] = "rollback"
    """`rollback` restores the last good checkpoint and skips the data read since (PaLM, arXiv 2204.02311, section 5.1);
    `stop` ends with an error, as does a rollback without a checkpoint."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks in a run; the divergence after the last one ends with an error."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Compute precision. Parameters, gradient reduction and optimizer states stay fp32. fp8 is bf16 with the matmuls of
    blocks in e4m3 (model/fp8/linear.py), on Hopper GPUs; CPUs emulate it."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """`full` recomputes each block's activations in the backward pass: less memory, about a third more compute."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    loss_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits are in memory at one time; fp32 logits of 4,096 x 129,280 would take 2.1 GB."""
    mtp_loss_weight: NonNegativeFloat = 0.3
    """Weight of the multi-token prediction loss."""
    balance_loss_weight: NonNegativeFloat = 1e-4
    """Weight of the experts' sequence-wise auxiliary balance loss."""
    expert_bias_update_rate: NonNegativeFloat = 1e-3
    """Step size of the router's selection bias, which balances the experts' load without a loss; 0 freezes it."""
    log_every_steps: PositiveInt = 1
    """Steps between two records in the run's metrics."""
    evaluate_every_steps: PositiveInt | None = None
    """Steps between two evaluations of the held-out loss; `null` evaluates only at the end."""
    heldout_sequences: PositiveInt = 64
    """Sequences of a held-out evaluation during training."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of a rank; `null` divides the machine's cores among its ranks."""
    deterministic: bool = False
    """Deterministic kernels only, and seeded random generators: the same job gives the same bits again, more slowly. An
    operator that has no deterministic kernel is an error."""
    profile: ProfileConfig | None = None
    """Profile some steps on some ranks; `null` profiles none."""

    def problems(self) -> Iterator[Problem]:
        """Problems with decays that are too slow for bf16 states."""
        decays = {"beta1": self.beta1, "beta2": self.beta2}
        if self.optimizer == "muon":
            decays["muon.momentum"] = self.muon.momentum
        key = max(decays, key=decays.__getitem__)
        if self.optimizer_state_dtype == "bf16" and decays[key] > _BF16_MAX_BETA:
            rule = (
                f"must be at most {_BF16_MAX_BETA} with train.optimizer_state_dtype bf16, whose moments stick above it"
            )
            yield Problem(key, rule, decays[key])


LoraTarget = Literal[
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "shared_gate_up", "shared_down"
]


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on frozen weights; they are merged into an export."""

    rank: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale: the adapters' output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapters' input during training."""
    targets: tuple[LoraTarget, ...] | None = None
    """Adapted projections: those of every attention, and `shared_gate_up` and `shared_down` of the shared experts;
    `null` adapts all that the model has."""

    def problems(self) -> Iterator[Problem]:
        """Problem with an empty list of targets, which would train nothing."""
        if self.targets is not None and not self.targets:
            yield Problem("targets", "must name at least one projection; null is all that the model has", [])
