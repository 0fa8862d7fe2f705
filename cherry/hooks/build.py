"""The trainer's own hooks besides metrics.jsonl: profiles, and reports of each rank's pace."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from cherry.hooks.profiler import ProfilerHook
from cherry.hooks.protocol import TrainerHook
from cherry.hooks.rank_reports import ForwardTimer, RankReports, timed_modules
from cherry.job_config import JobConfig
from cherry.watch.stragglers import Stragglers

logger = logging.getLogger(__name__)


def build_hooks(
    config: JobConfig, network: nn.Module, directory: Path, device: torch.device, print_line: Callable[[str], None]
) -> list[TrainerHook]:
    """The hooks that the configuration asks for on this rank.

    Args:
        network: the sharded model in training.
        directory: `train/` of the run directory.
        print_line: prints a line for people, on rank 0 only.
    """
    train, rank = config.train, dist.get_rank()
    hooks: list[TrainerHook] = []
    if train.profile is not None and rank in train.profile.ranks:
        told = print_line if rank == 0 else logger.info
        hooks.append(ProfilerHook(train.profile, directory / "profile", rank=rank, print_line=told))
    return [*hooks, _rank_reports(config, network, directory, device, print_line)]


def _rank_reports(
    config: JobConfig, network: nn.Module, directory: Path, device: torch.device, print_line: Callable[[str], None]
) -> RankReports:
    rank, ranks, share = dist.get_rank(), dist.get_world_size(), config.train.straggler_share
    compares = share is not None and ranks > 1
    return RankReports(
        ForwardTimer(timed_modules(network, config), device) if compares else None,
        directory,
        rank=rank,
        ranks=ranks,
        every_s=config.train.rank_report_every_s,
        stragglers=Stragglers(share) if share is not None and compares and rank == 0 else None,
        print_line=print_line,
    )
