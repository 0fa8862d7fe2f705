"""Trainer hooks: the protocol of observers of a training run, and how the trainer calls them.

A hook subclasses `TrainerHook`, overrides the methods it needs, and is handed to `Trainer(..., hooks=[...])` or to
`cherry.rank_main.main(hooks=[...])` in a program of one's own that `cherry-launch` starts in place of train.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from base.errors import CherryError
from cherry.heldout import Heldout
from cherry.train_record import TrainRecord

logger = logging.getLogger(__name__)


class TrainerHook(Protocol):
    """Called on every rank's training thread, in this order: step begin, evaluation if one is due, step end, save.

    Step numbers count from 1, as in metrics.jsonl. They grow by one from call to call but after a rollback, where
    training continues from a checkpoint: the next step to begin then is not above the last one that ended. After a
    resume the first step to begin is the one after the checkpoint's.

    A hook may raise a `CherryError` to end the run, on every rank at the same step. Any other exception is logged with
    its traceback; that hook is closed and no longer called, and training continues. A hook that runs collectives must
    run them on all ranks, and must not fail on some of them only: the others would wait for it.
    """

    def on_step_begin(self, step: int) -> None:
        """Called before the optimizer step's data is taken and its forward pass begins."""
        return

    def on_evaluate(self, step: int, heldout: Heldout) -> None:
        """Called after an evaluation on held-out documents, which every rank takes part in."""
        return

    def on_step_end(self, record: TrainRecord) -> None:
        """Called after the optimizer step, taken or skipped, and its evaluation.

        Args:
            record: the step's line in metrics.jsonl. It is shared by all hooks: read it, do not change it.
        """
        return

    def on_save(self, step: int, checkpoint: str) -> None:
        """Called after a save began: the state was captured and is written in the background.

        Args:
            checkpoint: URI that the checkpoint will have once it is committed. A failed save is in a later record's
                `failed_saves`.
        """
        return

    def close(self) -> None:
        """Called once, when the run ends for any reason or when this hook failed."""
        return


class HookList:
    """Calls several hooks in the order they were given; see `TrainerHook` for errors that hooks raise.

    Args:
        print_line: prints a line for people.
    """

    def __init__(self, hooks: Sequence[TrainerHook], print_line: Callable[[str], None]) -> None:
        self._hooks = list(hooks)
        self._print_line = print_line

    def on_step_begin(self, step: int) -> None:
        """Call `TrainerHook.on_step_begin` of each hook."""
        self._call("on_step_begin", lambda hook: hook.on_step_begin(step))

    def on_evaluate(self, step: int, heldout: Heldout) -> None:
        """Call `TrainerHook.on_evaluate` of each hook."""
        self._call("on_evaluate", lambda hook: hook.on_evaluate(step, heldout))

    def on_step_end(self, record: TrainRecord) -> None:
        """Call `TrainerHook.on_step_end` of each hook."""
        self._call("on_step_end", lambda hook: hook.on_step_end(record))

    def on_save(self, step: int, checkpoint: str) -> None:
        """Call `TrainerHook.on_save` of each hook."""
        self._call("on_save", lambda hook: hook.on_save(step, checkpoint))

    def close(self) -> None:
        """Close every hook, once.

        Raises:
            CherryError: the first error that a hook raised, after all were closed.
        """
        hooks, self._hooks = self._hooks, []
        first: CherryError | None = None
        for hook in hooks:
            try:
                hook.close()
            except CherryError as error:
                first = first or error
            except Exception as error:
                self._report(hook, "close", error)
        if first is not None:
            raise first

    def _call(self, event: str, call: Callable[[TrainerHook], None]) -> None:
        for hook in tuple(self._hooks):
            try:
                call(hook)
            except CherryError:
                raise
            except Exception as error:
                self._hooks.remove(hook)
                self._report(hook, event, error)
                with suppress(Exception):
                    hook.close()

    def _report(self, hook: TrainerHook, event: str, error: Exception) -> None:
        name = f"{type(hook).__module__}.{type(hook).__qualname__}"
        logger.error("hook %s failed in %s", name, event, exc_info=error)
        self._print_line(f"hook {name} failed in {event} and is no longer called, training continues: {error!r}")
