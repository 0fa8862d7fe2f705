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
from anything.engine.model_runner import ModelRunner, Sampling, sample
from anything.engine.scheduler import ScheduledChunk, Scheduler, Sequence
from anything.protocol import Chunk, EngineStatus, Generation, RefusedError, UnavailableError, Usage
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

    Args:
        uri: a folder in Hugging Face's layout. A quantized folder stays quantized in memory.
        version: label of its chunks.
    """

    def __init__(self, uri: str, config: EngineConfig, *, version: str) -> None:
        self._uri = uri
        self._config = config
        self._version = version
        self._scheduler = Scheduler(
            blocks=config.cache_blocks,
            block_tokens=config.block_tokens,
            max_running=config.max_running,
            prefill_chunk_tokens=config.prefill_chunk_tokens,
            max_waiting=config.max_waiting,
        )
        self._jobs: dict[Sequence, _Job] = {}
        # Guards the scheduler, the jobs and the flags below; notified when there is work, or the engine stops.
        self._work = threading.Condition()
        self._stopping = False
        self._failure: UnavailableError | None = None
        self._steps = 0
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
            UnavailableError: max_waiting requests are queued (429), or the engine failed or stops (503).
        """
        prompt = await asyncio.to_thread(self._tokenizer.encode, generation.prompt)
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
        """Whether the model is loaded and no step has failed."""
        return self._thread is not None and self._thread.is_alive() and self._failure is None

    async def status(self) -> EngineStatus:
        """Running and waiting sequences, free cache blocks, and counts of preemptions and engine steps."""
        with self._work:
            gauges = {
                "running": self._scheduler.running,
                "waiting": self._scheduler.waiting,
                "cache_blocks": self._config.cache_blocks,
                "cache_blocks_free": self._scheduler.free_blocks,
                "preemptions": self._scheduler.preemptions,
                "steps": self._steps,
            }
        return EngineStatus(gauges)

    async def close(self) -> None:
        """Stop the engine loop after its current step; generations in flight fail with 503."""
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _main(self, loop: asyncio.AbstractEventLoop, loaded: asyncio.Future[None]) -> None:
        """Engine loop: load the model, then schedule, run and deliver steps until it stops or one fails."""
        try:
            self._load()
        except BaseException as error:
            _call(loop, _fail, loaded, error)
            return
        _call(loop, _succeed, loaded)
        failure = UnavailableError("the engine has ended", status=503, code="engine_ended")
        try:
            while chunks := self._next_chunks():
                self._deliver(chunks, self._run(chunks))
        except Exception as error:
            logger.exception("a step of the engine failed; it takes no more requests")
            failure = UnavailableError(
                f"the engine failed: {type(error).__name__}", status=503, code="engine_failed", retry_after_s=5
            )
        with self._work:
            self._failure = failure
            for job in self._jobs.values():
                self._scheduler.cancel(job.sequence)
                _call(job.loop, job.queue.put_nowait, failure)
            self._jobs.clear()

    def _load(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        device, dtype = _place(self._config)
        self._tokenizer = Tokenizer(self._uri)
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

    def _run(self, chunks: list[ScheduledChunk]) -> dict[int, int]:
        """Sampled token of each chunk that samples, by the chunk's index."""
        indices, logits = self._runner.step(chunks)
        with self._work:
            self._steps += 1
            jobs = [self._jobs.get(chunks[index].sequence) for index in indices]
        # A generation that was cancelled meanwhile gets a token that is discarded.
        samplings = [_GREEDY if job is None else job.sampling for job in jobs]
        return dict(zip(indices, sample(logits, samplings), strict=True))

    def _deliver(self, scheduled: list[ScheduledChunk], tokens: dict[int, int]) -> None:
        """Update the scheduler from a step's output, and queue the text: one wake-up of each event loop."""
        ready: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Chunk]]] = defaultdict(list)
        with self._work:
            for index, computed in enumerate(scheduled):
                job = self._jobs.get(computed.sequence)
                if job is None:
                    continue
                chunk = self._update(job, computed, tokens.get(index))
                if chunk is not None:
                    ready[job.loop].append((job, chunk))
        for loop, chunks in ready.items():
            _call(loop, _put, chunks)

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


def _put(chunks: list[tuple[_Job, Chunk]]) -> None:
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
