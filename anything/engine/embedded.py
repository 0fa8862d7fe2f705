"""Embedded engine: the engine loop in a thread of its own, and the asynchronous API that streams its text."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from anything.engine.detokenizer import IncrementalDetokenizer, Tokenizer
from anything.engine.model_runner import ModelRunner, NonFiniteError, Sampling, sample
from anything.engine.restarts import MAX_RESTARTS, WINDOW_S, RestartBudget
from anything.engine.scheduler import ScheduledChunk, Scheduler, Sequence
from anything.protocol import (
    Chunk,
    EngineStatus,
    Generation,
    GenerationError,
    RefusedError,
    UnavailableError,
    Usage,
)
from anything.serve_config import EngineConfig
from base.errors import ConfigError, WeightsError
from model.weights.pretrained import load_pretrained

logger = logging.getLogger(__name__)


_GREEDY = Sampling(0.0)


@dataclass(eq=False)
class _Job:
    """One generation: its sampling and detokenizer in the engine loop, and the queue that its chunks go to."""

    sequence: Sequence
    sampling: Sampling
    detokenizer: IncrementalDetokenizer
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Chunk | UnavailableError]


class EmbeddedEngine:
    """Continuous batching over a paged latent cache, in this process.

    A request that fails ends alone: its numbers are not finite, its text cannot be decoded, or a step raises that holds
    it. When the model itself does not run any more, the cache and the scheduler are built anew a few times; then the
    engine is broken for good, and `status` says why.

    Args:
        uri: a folder in Hugging Face's layout. A quantized folder stays quantized in memory.
        version: label of its chunks.
    """

    def __init__(self, uri: str, config: EngineConfig, *, version: str) -> None:
        self._uri = uri
        self._config = config
        self._version = version
        self._scheduler = _new_scheduler(config)
        self._jobs: dict[Sequence, _Job] = {}
        # Guards the scheduler, the jobs and the flags below; notified when there is work, or the engine stops.
        self._work = threading.Condition()
        self._stopping = False
        self._failure: UnavailableError | None = None
        self._steps = 0
        self._failed_generations = 0
        self._restarts = RestartBudget()
        self._thread: threading.Thread | None = None
        self._runner: ModelRunner
        self._tokenizer: Tokenizer
        self._context_tokens = 0
        self._end_token = 0

    async def start(self) -> None:
        """Load the model in the engine's thread, and start the engine loop.

        Raises:
            MissingFileError, WeightsError, ConfigError: the folder does not hold a model that can be served.
        """
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[None] = loop.create_future()
        # A daemon: a process that ends while weights are being read must not wait for them.
        self._thread = threading.Thread(target=self._main, args=(loop, loaded), name="engine", daemon=True)
        self._thread.start()
        await loaded

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk]:
        """Chunks of whole characters as they are complete; see the protocol.

        Raises:
            RefusedError: the prompt has no token, or leaves no room in the context (422).
            GenerationError: the engine failed on this request (500).
            UnavailableError: max_waiting requests are queued (429), or the engine is broken or stops (503).
        """
        prompt = await asyncio.to_thread(self._encode, generation.prompt)
        job = self._submit(prompt, generation)
        try:
            while True:
                chunk = await job.queue.get()
                if isinstance(chunk, UnavailableError):
                    raise chunk
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            with self._work:
                if self._jobs.pop(job.sequence, None) is not None:
                    self._scheduler.cancel(job.sequence)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text)
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            logger.exception("a prompt could not be encoded")
            raise _generation_error(error) from error

    def _submit(self, prompt: list[int], generation: Generation) -> _Job:
        room = min(self._context_tokens, self._scheduler.capacity_tokens) - len(prompt)
        if not prompt or room < 1:
            raise RefusedError(
                f"prompt: must have 1 to {room + len(prompt) - 1} tokens with this model and cache (got {len(prompt)})"
            )
        params = generation.sampling
        seed = secrets.randbits(63) if params.seed is None else params.seed
        sampling = Sampling(params.temperature, torch.Generator().manual_seed(seed))
        loop = asyncio.get_running_loop()
        with self._work:
            if self._failure is not None:
                raise self._failure
            sequence = self._scheduler.add(prompt, min(params.max_tokens, room))
            job = _Job(sequence, sampling, IncrementalDetokenizer(self._tokenizer), loop, asyncio.Queue())
            self._jobs[sequence] = job
            self._work.notify()
        return job

    async def ready(self) -> bool:
        """Whether the model is loaded and the engine loop runs."""
        return self._thread is not None and self._thread.is_alive() and self._failure is None

    async def status(self) -> EngineStatus:
        """Running and waiting sequences, free cache blocks, counts of preemptions, steps, failures and restarts."""
        with self._work:
            gauges = {
                "running": self._scheduler.running,
                "waiting": self._scheduler.waiting,
                "cache_blocks": self._config.cache_blocks,
                "cache_blocks_free": self._scheduler.free_blocks,
                "preemptions": self._scheduler.preemptions,
                "steps": self._steps,
                "failed_generations": self._failed_generations,
                "restarts": self._restarts.taken,
            }
            down = self._failure is not None and self._failure.code == "engine_down"
            failure = str(self._failure) if down else None
        return EngineStatus(gauges, versions=(self._version,), failure=failure)

    async def close(self) -> None:
        """Stop the engine loop after its current step; generations in flight fail with 503."""
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _main(self, loop: asyncio.AbstractEventLoop, loaded: asyncio.Future[None]) -> None:
        """Engine loop: load the model, then serve until it stops or is broken for good."""
        try:
            self._load()
        except BaseException as error:
            _call(loop, _fail, loaded, error)
            return
        _call(loop, _succeed, loaded)
        failure = self._serve()
        with self._work:
            self._failure = failure
        self._fail_all(failure)

    def _serve(self) -> UnavailableError:
        """Error for every request after the engine loop: it schedules, runs and delivers steps until it must end."""
        while True:
            try:
                while chunks := self._next_chunks():
                    self._deliver(chunks, self._run(chunks))
                return UnavailableError("the engine has ended", status=503, code="engine_ended")
            except BaseException as error:
                logger.exception("the engine failed; it is started again")
                self._fail_all(_generation_error(error))
                if not self._restart():
                    text = (
                        f"the engine is broken ({type(error).__name__}): it failed {MAX_RESTARTS + 1} times within "
                        f"{WINDOW_S:g} s. Start the server again; its log has the cause."
                    )
                    return UnavailableError(text, status=503, code="engine_down", retry_after_s=5)

    def _restart(self) -> bool:
        """Whether the model runs again, with a new cache, before the restarts are used up."""
        while self._restarts.take():
            try:
                self._runner.reset()
            except BaseException:
                logger.exception("the engine could not be started again")
                continue
            return True
        return False

    def _fail_all(self, failure: UnavailableError) -> None:
        """End every generation with an error; the scheduler is a new one."""
        with self._work:
            for job in self._jobs.values():
                _call(job.loop, job.queue.put_nowait, failure)
            self._jobs.clear()
            self._scheduler = _new_scheduler(self._config)

    def _load(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        device, dtype = _place(self._config)
        self._tokenizer = Tokenizer(self._uri, control_tokens=self._config.control_tokens_in_prompts)
        model = load_pretrained(self._uri, dtype=dtype, device=device)
        config = model.config
        if self._tokenizer.size > config.vocab_size:
            raise WeightsError(
                f"{self._uri}: tokenizer.json has tokens up to {self._tokenizer.size - 1}, the model only "
                f"{config.vocab_size}. They do not belong together; export the model again."
            )
        self._context_tokens, self._end_token = config.max_position_embeddings, config.eos_token_id
        blocks, block_tokens = self._config.cache_blocks, self._config.block_tokens
        self._runner = ModelRunner(model, blocks=blocks, block_tokens=block_tokens)
        logger.info("loaded %s on %s as %s", self._uri, device, dtype)

    def _next_chunks(self) -> list[ScheduledChunk]:
        """Chunks of the next step, once there is work; empty when the engine stops."""
        with self._work:
            while not self._stopping and not self._jobs:
                self._work.wait()
            return [] if self._stopping else self._scheduler.schedule()

    def _run(self, chunks: list[ScheduledChunk]) -> dict[int, int | BaseException]:
        """Sampled token of each chunk that samples, or what failed for a chunk, by the chunk's index.

        A step that raises is run again chunk by chunk, which finds the chunks that it raises for. When it raises for
        all of them the cache is not trusted any more: the other sequences are computed again.
        """
        try:
            return self._compute(chunks)
        except Exception:
            logger.exception("a step of %d sequences failed; each is now run alone", len(chunks))
        outcomes: dict[int, int | BaseException] = {}
        raised = 0
        for index, chunk in enumerate(chunks):
            try:
                of_chunk = self._compute([chunk])
                if of_chunk:
                    outcomes[index] = of_chunk[0]
            except Exception as error:
                outcomes[index] = error
                raised += 1
        if raised == len(chunks):
            with self._work:
                self._scheduler.preempt_all()
            self._runner.reset()
        return outcomes

    def _compute(self, chunks: list[ScheduledChunk]) -> dict[int, int | BaseException]:
        output = self._runner.step(chunks)
        with self._work:
            self._steps += 1
            jobs = [self._jobs.get(chunks[index].sequence) for index in output.sampled]
        # A generation that was cancelled meanwhile gets a token that is discarded.
        samplings = [_GREEDY if job is None else job.sampling for job in jobs]
        outcomes: dict[int, int | BaseException] = {}
        outcomes.update(zip(output.sampled, sample(output.logits_NY, samplings), strict=True))
        outcomes.update((index, NonFiniteError("the model's latents are not finite")) for index in output.broken)
        return outcomes

    def _deliver(self, scheduled: list[ScheduledChunk], outcomes: dict[int, int | BaseException]) -> None:
        """Update the scheduler from a step's output, and queue the text: one wake-up of each event loop."""
        ready: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Chunk | UnavailableError]]] = defaultdict(list)
        with self._work:
            for index, computed in enumerate(scheduled):
                job = self._jobs.get(computed.sequence)
                if job is None:
                    continue
                chunk = self._chunk_or_error(job, computed, outcomes.get(index))
                if chunk is not None:
                    ready[job.loop].append((job, chunk))
        for loop, chunks in ready.items():
            _call(loop, _put, chunks)

    def _chunk_or_error(
        self, job: _Job, computed: ScheduledChunk, outcome: int | BaseException | None
    ) -> Chunk | UnavailableError | None:
        """Text to send for a computed chunk, if any, or the error that ends its generation alone."""
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            return self._update(job, computed, outcome)
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            known = isinstance(error, NonFiniteError)
            logger.error("a generation failed: %s", error if known else type(error).__name__, exc_info=not known)
            self._failed_generations += 1
            self._jobs.pop(computed.sequence, None)
            self._scheduler.cancel(computed.sequence)
            return _generation_error(error)

    def _update(self, job: _Job, computed: ScheduledChunk, token: int | None) -> Chunk | None:
        """Text to send for a computed chunk, if any."""
        end = token == self._end_token
        reason = self._scheduler.update_from_output(computed, token, end=end)
        text = job.detokenizer.push(token) if token is not None and not end else ""
        if reason is None:
            return Chunk(text, self._version) if text else None
        del self._jobs[computed.sequence]
        usage = Usage(len(computed.sequence.prompt), len(computed.sequence.generated))
        return Chunk(text + job.detokenizer.finish(), self._version, reason, usage)


def _new_scheduler(config: EngineConfig) -> Scheduler:
    return Scheduler(
        blocks=config.cache_blocks,
        block_tokens=config.block_tokens,
        max_running=config.max_running,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        max_waiting=config.max_waiting,
    )


def _generation_error(error: BaseException) -> GenerationError:
    """Error for the request that `error` ended; the error's own text stays in the log, since it may quote others."""
    if isinstance(error, NonFiniteError):
        text = "the model's output for this request is not a number (NaN or infinite), so it has no next token."
    else:
        text = f"the engine failed on this request ({type(error).__name__}); the server's log has the cause."
    return GenerationError(text)


def _place(config: EngineConfig) -> tuple[str, torch.dtype]:
    """Device and type that the configuration selects on this machine.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("serve.engine.device: this machine has no CUDA GPU that torch can use (got 'cuda')")
    if config.dtype != "auto":
        return device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    return device, torch.bfloat16 if device == "cuda" else torch.float32


def _put(chunks: list[tuple[_Job, Chunk | UnavailableError]]) -> None:
    for job, chunk in chunks:
        job.queue.put_nowait(chunk)


def _succeed(loaded: asyncio.Future[None]) -> None:
    if not loaded.done():
        loaded.set_result(None)


def _fail(loaded: asyncio.Future[None], error: BaseException) -> None:
    if not loaded.done():
        loaded.set_exception(error)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Run a function on an event loop, which may have ended by now."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)
