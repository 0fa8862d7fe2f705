"""Reports of this rank's pace, as a trainer hook, and on rank 0 the comparison that names stragglers.

A step takes as long on all ranks, since they wait for each other in its collectives. What a rank computes for itself is
timed inside the forward pass, between a module's all-gather and its end: by the clock, or by events on a GPU's stream
(as MegaScale does it, arXiv 2402.15627, section 5.1), which are read once the step has ended.
"""

from __future__ import annotations

import logging
import queue
import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cherry.hooks.protocol import TrainerHook
from cherry.job_config import JobConfig
from cherry.train_record import TrainRecord
from cherry.watch.rank_report import RankReport, read_reports
from cherry.watch.stragglers import Stragglers
from model.layers import SwiGLU
from model.transformer import Block

logger = logging.getLogger(__name__)
# A file system that hangs does not hold the end of training up.
_CLOSE_S = 10.0


class ForwardTimer:
    """Time that modules take in the forward pass of training, summed over a step.

    Args:
        modules: none inside another; without collectives.
        device: of the modules.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        """Begin and end in turn: seconds, or CUDA events."""
        # Outside of a compiled block's graph, as FSDP's own hooks are.
        mark = torch.compiler.disable(self._mark)  # type: ignore[no-untyped-call]
        self._handles = [
            handle
            for module in modules
            for handle in (
                # After the hook of FSDP that gathers the parameters, and before the one that frees them.
                module.register_forward_pre_hook(mark),
                module.register_forward_hook(mark, prepend=True),
            )
        ]

    def _mark(self, module: nn.Module, *_: Any) -> None:
        if not module.training:
            return
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def take(self) -> float | None:
        """Seconds since the last call; `None` where nothing was timed. The step's last kernel must have ended."""
        marks, self._marks = self._marks, []
        pairs = list(zip(marks[::2], marks[1::2], strict=False))
        if not pairs or len(marks) % 2:  # a forward pass that an error ended
            return None
        if not self._cuda:
            return float(sum(end - begin for begin, end in pairs))
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1000.0

    def close(self) -> None:
        """Stop timing."""
        for handle in self._handles:
            handle.remove()


def timed_modules(network: nn.Module, config: JobConfig) -> list[nn.Module]:
    """Modules that every rank computes in the same shapes without waiting for another.

    Whole blocks; their dense and shared feed-forwards where the rest of a block has collectives. Compiled blocks are
    not timed with those: a hook inside would break their graphs.
    """
    parallel = config.parallel
    if parallel.expert == 1 and parallel.context == 1:
        return [module for module in network.modules() if isinstance(module, Block)]
    if config.train.compile:
        return []
    return [module for module in network.modules() if isinstance(module, SwiGLU)]


def _lower_quartile(values: list[float]) -> float:
    return sorted(values)[len(values) // 4]


class RankReports(TrainerHook):
    """Writes this rank's report every `every_s` seconds, by a thread; on rank 0 the thread also compares the ranks.

    Args:
        timer: of this rank's own computation; `None` measures none.
        directory: `train/` of the run directory.
        stragglers: compares the reports; on rank 0, where there are other ranks.
        print_line: prints a line for people.
    """

    def __init__(
        self,
        timer: ForwardTimer | None,
        directory: Path,
        *,
        rank: int,
        ranks: int,
        every_s: float,
        stragglers: Stragglers | None,
        print_line: Callable[[str], None],
    ) -> None:
        self._timer = timer
        self._directory = directory
        self._rank, self._ranks, self._host = rank, ranks, socket.gethostname()
        self._every_s = every_s
        self._stragglers = stragglers
        self._print_line = print_line
        self._began = time.time()
        self._due = time.monotonic()
        self._wall: list[float] = []
        self._own: list[float] = []
        self._is_warm = False
        """Whether a step was taken: how long the first one takes (kernels are chosen, memory is found) tells nothing of
        the rank's pace, and is not the same on all ranks. So the first report has none, and is not compared."""
        self._reports: queue.SimpleQueue[RankReport | None] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="rank-reports", daemon=True)
        self._thread.start()

    def on_step_end(self, record: TrainRecord) -> None:
        """Take the step's times; hand a report to the thread, if it is due."""
        if record.step_seconds is not None:
            self._wall.append(record.step_seconds)
        own = None if self._timer is None else self._timer.take()
        if own is not None and self._is_warm:
            self._own.append(own)
        self._is_warm = True
        self._print_news()
        if time.monotonic() < self._due or not self._wall:
            return
        report = RankReport(
            rank=self._rank,
            ranks=self._ranks,
            host=self._host,
            step=record.step,
            time=time.time(),
            step_seconds=statistics.median(self._wall),
            own_seconds=_lower_quartile(self._own) if self._own else None,
        )
        self._reports.put(report)
        self._wall, self._own = [], []
        self._due = time.monotonic() + self._every_s

    def close(self) -> None:
        """Write what is left, and stop."""
        if self._timer is not None:
            self._timer.close()
        self._reports.put(None)
        self._thread.join(_CLOSE_S)
        self._print_news()

    def _print_news(self) -> None:
        """Print what the thread has found; it prints nothing itself, between the parts of another line."""
        while not self._news.empty():
            self._print_line(self._news.get())

    def _write(self) -> None:
        while (report := self._reports.get()) is not None:
            try:
                report.write(self._directory)
                if self._stragglers is not None:
                    self._compare(self._stragglers)
            except OSError as error:  # the next report may be written again
                logger.warning("a report of this rank is lost: %s", error)

    def _compare(self, stragglers: Stragglers) -> None:
        found = read_reports(self._directory, range(self._ranks))
        # Those of an earlier start are not of these ranks.
        comparison = stragglers.compare([one for one in found if one.time >= self._began], self._ranks)
        if comparison is not None:
            comparison.append_to(self._directory)
            for sentence in comparison.news:
                self._news.put(sentence)
