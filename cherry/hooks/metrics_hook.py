"""Reports of a training run, as a trainer hook: metrics.jsonl, and lines for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cherry.hooks.protocol import TrainerHook
from cherry.metrics import MetricsWriter, format_line
from cherry.train_record import TrainRecord

# Nobody reads ten lines a second, and whoever relays them pays for each; metrics.jsonl has them all.
_PRINT_EVERY_S = 1.0


class MetricsHook(TrainerHook):
    """Writes the records of one run to metrics.jsonl and prints them; rank 0's.

    After a rollback or a resume, lines of steps that are trained again are dropped from the file.

    Args:
        path: metrics.jsonl.
        resume_step: the last step whose lines are kept.
        log_every_steps: steps between written records; the last step's is always written.
        print_line: prints a line for people, with the fraction of the run that is done if it reports progress.
        saved: lines that the checkpoint keeps which training resumes from; see `MetricsWriter`.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int,
        log_every_steps: int,
        print_line: Callable[[str, float | None], None],
        saved: Sequence[str] = (),
    ) -> None:
        self.print_every_s = _PRINT_EVERY_S
        """Least time between two printed lines of ordinary steps."""
        self._path = path
        self._every = log_every_steps
        self._print_line = print_line
        self._print_from = 0.0  # by the monotonic clock
        self._step = resume_step
        self._writer = MetricsWriter(path, resume_step=resume_step, saved=saved)

    @property
    def first_loss(self) -> float | None:
        """The first loss in the file, in nats per token."""
        return self._writer.first_loss

    def recent(self) -> list[str]:
        """The last lines, as a checkpoint keeps them."""
        return self._writer.recent()

    def on_step_begin(self, step: int) -> None:
        """Drop the lines of steps that a rollback undid."""
        if step <= self._step:
            self._writer.close()
            self._writer = MetricsWriter(self._path, resume_step=step - 1, saved=self._writer.recent())

    def on_step_end(self, record: TrainRecord) -> None:
        """Write and print the record, if it is due."""
        self._step = record.step
        marked = record.step == record.steps or record.marked
        if marked or record.step % self._every == 0:
            self._writer.write(record)
            if marked or time.monotonic() >= self._print_from:
                self._print_line(format_line(record), record.step / record.steps if record.steps else None)
                self._print_from = time.monotonic() + self.print_every_s
        if record.skipped is not None:
            self._print_line(f"step {record.step} skipped: {record.skipped}", None)
        if record.corruption is not None:
            self._print_line(record.corruption, None)
        if failure := self._writer.new_failure():
            self._print_line(f"metrics wait in memory, training continues: {failure}", None)
        for failed in record.failed_saves or ():
            self._print_line(f"checkpoint not saved, training continues: {failed}", None)

    def close(self) -> None:
        """Close metrics.jsonl."""
        self._writer.close()
