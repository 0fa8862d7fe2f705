"""Training checkpoints: saved asynchronously, committed by a marker file, pruned, and verified when they are loaded.

Each step has a directory of its own. What is committed is never overwritten, and removed only as `keep_last` and
`keep_every_steps` say, or where a rollback left it. A directory without its marker counts as absent.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from base import storage
from base.errors import CheckpointError, CherryError, SupersededError
from base.progress import busy
from cherry.checkpoint.digests import as_storage_error, digest_own, verify
from cherry.checkpoint.fence import Fence
from cherry.checkpoint.naming import committed_steps, step_name, step_of
from cherry.checkpoint.resume_rules import check_model
from cherry.checkpoint.staging import Staging

logger = logging.getLogger(__name__)
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class Checkpointer:
    """Saves one job's training state. Every rank calls every method, in the same order.

    Args:
        directory: parent of the step directories, as a path or URI.
        keep_last: number of newest checkpoints to keep.
        keep_every_steps: checkpoints of steps that this divides are kept for good, too.
        asynchronous: write in the background; else `save` returns after the commit.
        group: a process group with a CPU backend that nothing else uses.
        fence: refuses the commit of an attempt that was superseded; `None` but on rank 0.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep_last: int,
        asynchronous: bool,
        group: dist.ProcessGroup,
        fence: Fence | None,
        keep_every_steps: int | None = None,
    ) -> None:
        self.directory = directory
        self.failures: list[CherryError] = []
        """Errors of the saves that failed, oldest first; they do not stop training."""
        self.last_saved: str | None = None
        self.stalled_seconds = 0.0
        """Seconds for which saves have blocked the training thread, in total."""
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        self._asynchronous = asynchronous
        self._group = group
        self._fence = fence
        self._pending: Future[None] | None = None
        self._staging = Staging()
        self._copying = False
        self._hooked: torch.optim.Optimizer | None = None
        self._rolled_back: int | None = None
        self._reported = 0

    @property
    def last_saved_step(self) -> int | None:
        """The step of `last_saved`."""
        return step_of(self.last_saved) if self.last_saved is not None else None

    def uri_of(self, step: int) -> str:
        """URI of a step's checkpoint, committed or not."""
        return storage.join(self.directory, step_name(step))

    def roll_back(self, step: int) -> None:
        """Have the next save replace the checkpoints after `step`, which led to divergence."""
        self._rolled_back = step

    def new_failures(self) -> list[CherryError]:
        """Errors of saves that failed since the last call, of the one in flight too; for reports only.

        A save ends at different times on different ranks: no collective decision may depend on this.
        """
        known: list[CherryError] = list(self.failures)
        if self._pending is not None and self._pending.done():
            error = self._pending.exception()
            known += [error] if isinstance(error, CherryError) else []
        new, self._reported = known[self._reported :], len(known)
        return new

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        record: dict[str, Any],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the current state in the background, after the previous save has ended.

        The state is copied while training continues. The optimizer's next step waits for that copy; any other code
        that changes parameters, optimizer states or large buffers must call `wait_until_copied` first.

        Args:
            record: resume state that is not a tensor (step, tokens, position, ...), for state.json and the marker.
            extra: further tensors under names that their owner reads back with `read_state`.
        """
        with self._stalling():
            self._finish()
            state = _state(model, optimizer, _random_states(dist.get_rank(self._group))) | dict(extra or {})
            snapshot = self._staging.begin(state)
            self._copying = True
            if self._hooked is not optimizer:
                optimizer.register_step_pre_hook(lambda *_: self.wait_until_copied())
                self._hooked = optimizer
            # One thread per save: a thread that stays alive keeps its OpenMP threads; see `_is_single_process`.
            thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._pending = thread.submit(self._write, step, snapshot, record)
            thread.shutdown(wait=False)
            if not self._asynchronous:
                self._finish()

    def wait_until_copied(self) -> None:
        """Block until the state is copied, so that changing it does not change what is being saved."""
        if self._copying:
            with self._stalling():
                self._staging.wait_until_copied()
            self._copying = False

    def wait(self) -> None:
        """Block until the save in flight is committed or has failed; a failure is added to `failures`, not raised.

        Raises:
            SupersededError: a newer attempt owns the run directory.
        """
        with self._stalling():
            self._finish()

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with busy("checkpoint"):
                yield
        finally:
            self.stalled_seconds += time.perf_counter() - started

    def _finish(self) -> None:
        self._copying = False
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except SupersededError:
            raise
        except CherryError as error:
            logger.error("checkpoint not saved: %s", error)
            self.failures.append(error)

    def close(self) -> None:
        """Wait for the save in flight; see `wait`."""
        self.wait()

    def _write(self, step: int, snapshot: dict[str, Any], record: dict[str, Any]) -> None:
        """Save on every rank's background thread: copy, clear, write, agree that all ranks wrote, commit, prune."""
        target, rank = self.uri_of(step), dist.get_rank(self._group)
        files: dict[str, list[Any]] = {}
        error: CherryError | None = None
        try:
            state = self._staging.copy(snapshot)
        except Exception as failure:  # no memory for the buffers
            error = as_storage_error(failure, target)
        del snapshot
        failed, _ = self._agree(error, files)
        failed = failed or self._clear(target)
        if cleared := failed is None:
            try:
                with _is_single_process(self._group) as single:
                    writer = self._writer(target)
                    save_state(state, storage_writer=writer, process_group=self._group, no_dist=single)
            except (Exception, CheckpointException) as failure:
                error = as_storage_error(failure, target)
            failed, files = self._digest(target, error)
        verdict: list[CherryError | None] = [failed]
        if rank == 0:
            try:
                self._check_fence()
                if failed is None:
                    self._commit(step, record, files)
                elif cleared:
                    storage.remove_tree(target)
            except Exception as failure:  # of any kind: the other ranks wait for the outcome
                verdict = [as_storage_error(failure, target)]
        dist.broadcast_object_list(verdict, group=self._group, group_src=0)
        if verdict[0] is not None:
            raise verdict[0]
        self.last_saved = target

    def _agree(
        self, error: CherryError | None, files: dict[str, list[Any]]
    ) -> tuple[CherryError | None, dict[str, list[Any]]]:
        """First error of any rank, and the digests of all ranks' files."""
        outcomes: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(outcomes, (error, files), group=self._group)
        failed = next((outcome[0] for outcome in outcomes if outcome[0] is not None), None)
        return failed, {name: digest for outcome in outcomes for name, digest in outcome[1].items()}

    def _digest(self, target: str, error: CherryError | None) -> tuple[CherryError | None, dict[str, list[Any]]]:
        """First error of any rank, or the digests of all ranks' files. Only rank 0 lists the storage."""
        names: list[Any] = [[]]
        files: dict[str, list[Any]] = {}
        try:
            if dist.get_rank(self._group) == 0 and error is None:
                names = [storage.list_names(target)]
        except CherryError as failure:
            error = failure
        dist.broadcast_object_list(names, group=self._group, group_src=0)
        try:
            if error is None:
                files = digest_own(target, names[0], dist.get_rank(self._group))
        except CherryError as failure:
            error = failure
        return self._agree(error, files)

    def _writer(self, target: str) -> FileSystemWriter:
        if storage.is_local(target):
            return FileSystemWriter(storage.local_path(target), sync_files=True)
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        writer: FileSystemWriter = FsspecWriter(target)
        return writer

    def _clear(self, target: str) -> CherryError | None:
        """Error of rank 0 in removing what an earlier attempt left at `target`, on every rank; `None` on success."""
        verdict: list[CherryError | None] = [None]
        if dist.get_rank(self._group) == 0:
            try:
                self._check_fence()  # a newer attempt may have committed this very step
                self._check_free(target)
                storage.remove_tree(target)
                storage.make_directory(target)
            except Exception as failure:  # as above
                verdict = [as_storage_error(failure, target)]
        dist.broadcast_object_list(verdict, group=self._group, group_src=0)
        return verdict[0]

    def _check_free(self, target: str) -> None:
        """Check that `target` is not committed, unless a rollback left it.

        Raises:
            CheckpointError: another run has committed it, or this one from another beginning.
        """
        step = step_of(target) or 0
        left = self._rolled_back is not None and step > self._rolled_back
        if not left and storage.is_committed(target):
            raise CheckpointError(
                f"{target} is committed already, and is not written to again: another run saves to {self.directory} "
                "too, or this one began before that step. Give this run another --run_dir or checkpoint.directory."
            )

    def _check_fence(self) -> None:
        if self._fence is not None:
            self._fence.check()

    def _commit(self, step: int, record: dict[str, Any], files: dict[str, list[Any]]) -> None:
        target = self.uri_of(step)
        storage.write_json(storage.join(target, "state.json"), record)
        storage.commit(target, {**record, "files": files})
        try:
            self._check_fence()  # a newer attempt may resume from what this one would remove
            for outdated in self._outdated(step):
                storage.remove_tree(self.uri_of(outdated))
            self._rolled_back = None
        except CherryError as error:
            logger.warning("an old checkpoint was not removed: %s", error)  # the new checkpoint is committed anyway

    def _outdated(self, saved: int) -> list[int]:
        """Steps whose checkpoints are pruned once step `saved` is committed: older than `keep_last`, or left behind.

        Steps that a rollback left led to divergence: they must not count as the newest, nor push out older ones. Other
        later steps are not this training's to remove, and what a link points at may be another run's.
        """
        steps = committed_steps(self.directory)
        every = self._keep_every_steps
        older = [step for step in steps if step <= saved][: -self._keep_last]
        pruned = [step for step in older if every is None or step % every]
        if self._rolled_back is not None:
            pruned += [step for step in steps if step > saved]
        return [step for step in pruned if not storage.is_link(self.uri_of(step))]


def restore(
    uri: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup,
    *,
    expected_model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Record of a committed checkpoint, after loading it into a model and optimizer at any world size.

    Args:
        expected_model: architecture that the record's `model` must equal.

    Raises:
        MissingFileError: the directory was never committed.
        CheckpointError: a file is corrupt, truncated or missing, or the checkpoint is of another model.
    """
    record = storage.read_commit(uri)
    check_model(uri, record, expected_model)
    verify(uri, record, group)
    try:
        reader = reader_of(uri)
        state = _state(model, optimizer, _stored_random_states(reader, dist.get_rank(group)))
        read_state(state, reader, group)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{uri} does not fit the configured model, or cannot be read: {str(error).strip().splitlines()[-1]}. "
            "Resume with the config it was made with, or start in another run directory."
        ) from error
    set_model_state_dict(model, state["model"], options=_OPTIONS)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_OPTIONS)
    for kind, value in next(iter(state["random"].values()), {}).items():
        torch.cuda.set_rng_state(value) if kind == "cuda" else torch.set_rng_state(value)
    return record


def read_state(state: dict[str, Any], reader: FileSystemReader, group: dist.ProcessGroup | None) -> None:
    """Fill `state` in place from a checkpoint. Without a group, this process reads alone, without collectives."""
    with _is_single_process(group) as single:
        load_state(state, storage_reader=reader, process_group=group, no_dist=single)


@contextmanager
def _is_single_process(group: dist.ProcessGroup | None) -> Iterator[bool]:
    """True where the group has one process, which must then not use collectives.

    Each of gloo's threads copies what it sends with an OpenMP team of its own, and stays alive. While a process has
    more OpenMP threads than cores, libgomp does not spin between parallel regions: on 2 cores every step after the
    first save took 1.7 times as long (torch 2.13, 2026-11-24).
    """
    single = group is None or dist.get_world_size(group) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
        yield single


def reader_of(uri: str) -> FileSystemReader:
    """Distributed-checkpoint reader of the checkpoint at a path or URI."""
    if storage.is_local(uri):
        return FileSystemReader(storage.local_path(uri))
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    reader: FileSystemReader = FsspecReader(uri)
    return reader


def _random_states(rank: int) -> dict[str, Any]:
    """States of this rank's random number generators, under a key that is unique to the rank."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"rank_{rank}": states}


def _stored_random_states(reader: FileSystemReader, rank: int) -> dict[str, Any]:
    """Random states of this rank that a checkpoint holds: at another world size or device some are missing."""
    stored = reader.read_metadata().state_dict_metadata
    return {
        name: {kind: state for kind, state in states.items() if f"random.{name}.{kind}" in stored}
        for name, states in _random_states(rank).items()
    }


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, random: dict[str, Any]) -> dict[str, Any]:
    """State dicts of model, optimizer and random generators, with sharded tensors.

    Optimizer states that no step has created yet are created, as zeros.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    return {"model": model_state, "optimizer": optimizer_state, "random": random}
