"""Measures the gateway's latency per request and the embedded engine's throughput with continuous batching.

    python -m benchmarks.serve_overhead [--requests 1000] [--only gateway|engine] [--output benchmarks/results/F.jsonl]

Gateway: one POST on a keep-alive connection, answered by an echo engine without a model. `bare` is the same web server
with a route that does nothing, `front` is a gateway that routes to one replica. Subtract `bare` from the others for the
gateway's own latency.
Engine: the tiny preset with random weights, 16 prompts, greedy, 64 tokens each; transformers' generate in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPTS = 16
TOKENS = 64
_BODY = json.dumps({"prompt": "one", "max_tokens": 1}).encode()


def serve(kind: str, key_file: str, port_file: str, routes: str) -> None:
    """Serve one kind of server until the process is terminated."""
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    from anything.http.app import create_app
    from anything.http.serve import DrainingServer, bind, freeze_heap
    from anything.keys import load_keys
    from anything.router.routing import Router
    from anything.serve_config import ServeConfig
    from anything.testing import EchoEngine

    config, keys = ServeConfig(port=0), load_keys(key_file)
    app = create_app(Router(routes) if kind == "front" else EchoEngine(), config, keys)
    if kind == "bare":

        async def nothing(request: Request) -> JSONResponse:
            await request.body()
            return JSONResponse({"output": "one"})

        bare = FastAPI()
        bare.state.gateway = app.state.gateway
        bare.add_route("/v1/anything/infer", nothing, methods=["POST"])
        app = bare
    server = DrainingServer(app, bind(config.host, 0), port_file)
    server.on_ready = freeze_heap
    server.run()


async def _one_client(port: int, key: str, requests: int, seconds: list[float]) -> None:
    """Send requests in sequence on one raw connection and append each latency to `seconds`.

    No client library: it would cost more than the server.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/anything/infer HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {len(_BODY)}"
    message = head.encode() + b"\r\n\r\n" + _BODY
    for _ in range(requests):
        started = time.perf_counter()
        writer.write(message)
        headers = await reader.readuntil(b"\r\n\r\n")
        assert headers.startswith(b"HTTP/1.1 200"), headers
        length = int(headers.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        seconds.append(time.perf_counter() - started)
    writer.close()


def _quantiles_ms(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{q}_ms": round(ordered[int(q / 100 * (len(ordered) - 1))] * 1000, 3) for q in (50, 95, 99)}


async def _load(port: int, key: str, clients: int, requests: int) -> dict[str, float]:
    await asyncio.gather(*(_one_client(port, key, 20, []) for _ in range(clients)))
    seconds: list[float] = []
    started = time.perf_counter()
    await asyncio.gather(*(_one_client(port, key, requests // clients, seconds) for _ in range(clients)))
    return {**_quantiles_ms(seconds), "requests_per_second": round(len(seconds) / (time.perf_counter() - started), 1)}


def gateway(requests: int) -> dict[str, Any]:
    """Latency rows of each kind of server, with 1 client and with 16."""
    from anything.keys import create_key

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        key_file, routes, key_path = (str(Path(folder) / name) for name in ("keys.json", "routes.json", "key"))
        key = create_key(key_file)
        Path(key_path).write_text(key)
        processes = []
        try:
            for kind in ("bare", "gateway", "front"):
                port_file = Path(folder) / f"{kind}.json"
                command = [sys.executable, "-m", "benchmarks.serve_overhead", "--serve", kind]
                processes.append(subprocess.Popen([*command, key_file, str(port_file), routes]))
                while not port_file.exists():
                    assert processes[-1].poll() is None
                    time.sleep(0.02)
                record = json.loads(port_file.read_text())
                if kind == "gateway":
                    route = {"name": "a", "version": "a", "url": record["url"], "weight_percent": 100}
                    routing = {"salt": "", "replicas": [{**route, "api_key_file": key_path}]}
                    Path(routes).write_text(json.dumps(routing))
                result[kind] = {
                    f"{clients} clients": asyncio.run(_load(record["port"], key, clients, requests))
                    for clients in (1, 16)
                }
        finally:
            for process in processes:
                process.terminate()
                process.wait()
    return result


def _tiny_folder(folder: str) -> str:
    """Write the tiny preset with random weights and a byte-level tokenizer; its URI."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from model.model_config import ModelConfig
    from model.transformer import DeepseekV3
    from model.weights.pretrained import save_pretrained, state_to_hf

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters, 2)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    config = ModelConfig.model_validate({"preset": "tiny", "num_nextn_predict_layers": 0})
    model = DeepseekV3(config)
    model.init_weights(seed=0)
    uri = str(Path(folder) / "model")
    tensors = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, config))
    save_pretrained(tensors, uri, config, dtype=torch.float32, tokenizer_uri=str(Path(folder) / "tokenizer.json"))
    return uri


@asynccontextmanager
async def _engine(uri: str) -> AsyncIterator[Any]:
    from anything.engine.embedded import EmbeddedEngine
    from anything.serve_config import EngineConfig

    engine = EmbeddedEngine(uri, EngineConfig(), version="tiny")
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def _engine_rates(uri: str, prompts: list[str]) -> dict[str, float]:
    from anything.protocol import Generation, SamplingParams

    async with _engine(uri) as engine:

        async def ask(prompt: str) -> int:
            chunks = [chunk async for chunk in engine.generate(Generation(prompt, SamplingParams(max_tokens=TOKENS)))]
            return int(chunks[-1].usage.completion_tokens)

        await ask(prompts[0])
        started = time.perf_counter()
        alone = sum([await ask(prompt) for prompt in prompts])
        between = time.perf_counter()
        together = sum(await asyncio.gather(*map(ask, prompts)))
        ended = time.perf_counter()
    return {
        "one by one": round(alone / (between - started), 1),
        "batched": round(together / (ended - between), 1),
    }


def _transformers(uri: str, prompts: list[str]) -> float:
    """Tokens per second of transformers' generate on the same weights and device, all prompts in one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    from anything.engine.detokenizer import Tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(uri, dtype=dtype).to(device)
    tokens = torch.tensor([Tokenizer(uri).encode(prompt) for prompt in prompts], device=device)
    options = {"do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    model.generate(tokens, max_new_tokens=2, **options)
    started = time.perf_counter()
    output: torch.Tensor = model.generate(tokens, min_new_tokens=TOKENS, max_new_tokens=TOKENS, **options)
    generated = (int(output.shape[1]) - int(tokens.shape[1])) * len(prompts)
    return round(generated / (time.perf_counter() - started), 1)


def engine() -> dict[str, Any]:
    """Generated tokens per second: the engine with prompts one by one and together, transformers' generate."""
    prompts = [f"def function_{index:02}(argument):" for index in range(PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        uri = _tiny_folder(folder)
        return {
            "tokens_per_second": {
                **asyncio.run(_engine_rates(uri, prompts)),
                "transformers generate, batched": _transformers(uri, prompts),
            }
        }


def machine() -> dict[str, Any]:
    """Machine, versions and date of a measurement."""
    described: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    described["load"] = round(os.getloadavg()[0], 1)
    described["omp_num_threads"] = os.environ.get("OMP_NUM_THREADS")
    if "torch" in sys.modules:
        import torch

        described["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return described


def main() -> None:
    """Measure, print one JSON row a question, and keep it when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--only", choices=["gateway", "engine"])
    parser.add_argument("--output", help="append the rows to this file")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    for name in ("gateway", "engine"):
        if arguments.only not in (None, name):
            continue
        result = gateway(arguments.requests) if name == "gateway" else engine()
        packages = ("torch", "transformers") if name == "engine" else ("fastapi", "uvicorn", "httpx")
        row = {
            "benchmark": f"serve_overhead.{name}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python -m benchmarks.serve_overhead", *sys.argv[1:]]),
            "machine": machine(),
            "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
            "result": result,
        }
        print(json.dumps(row), flush=True)
        if arguments.output:
            with open(arguments.output, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
