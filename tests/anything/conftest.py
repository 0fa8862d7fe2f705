"""A tiny random model folder with a byte-level tokenizer, fp32 and int8, and servers that run in a thread."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from anything.keys import create_key, load_keys
from anything.protocol import Engine
from anything.serve_config import ServeConfig
from model.model_config import ModelConfig

EOS = 1


def tiny_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=EOS,
    )


def byte_tokenizer() -> Tokenizer:
    """Two special tokens, then one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": EOS} | {letter: index for index, letter in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch

    from model.transformer import DeepseekV3
    from model.weights.pretrained import save_pretrained, state_to_hf

    folder = tmp_path_factory.mktemp("model")
    config = tiny_config()
    model = DeepseekV3(config)
    model.init_weights(seed=7)
    tokenizer = folder / "tokenizer.json"
    byte_tokenizer().save(str(tokenizer))
    tensors = [pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, config)]
    uri = str(folder / "export")
    save_pretrained(tensors, uri, config, dtype=torch.float32, tokenizer_uri=str(tokenizer))
    return uri


@pytest.fixture(scope="session")
def int8_folder(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    from model.quantize import quantize_folder

    target = str(tmp_path_factory.mktemp("int8") / "quantized")
    quantize_folder(model_folder, target, lambda *_: None)
    return target


@pytest.fixture
def breaking_server() -> Iterator[str]:
    """The URL of a server that ends every stream after its first event, without a word."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
                connection.sendall(head + b'data: {"text":"one "}\n\n')
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(30)


@pytest.fixture
def key_file(tmp_path: Path) -> tuple[str, str]:
    """A file of key hashes, and the key."""
    path = str(tmp_path / "keys.json")
    return path, create_key(path)


@contextmanager
def serving(engine: Engine, key_file: str, config: ServeConfig | None = None) -> Iterator[str]:
    """A real server in a thread; its URL, once it is ready."""
    # Here, because the engine's own tests run on GPU machines without a web framework.
    from anything.http.app import create_app
    from anything.http.serve import DrainingServer, bind, url_of

    config = config or ServeConfig(port=0)
    listener = bind(config.host, 0)
    server = DrainingServer(create_app(engine, config, load_keys(key_file)), listener)
    ready = threading.Event()
    server.on_ready = ready.set
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield url_of(listener)
    finally:
        server.exit_soon()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def serve(key_file: tuple[str, str]) -> Iterator[Callable[..., str]]:
    """Start a server for an engine, with the key of `key_file`; all are stopped at the end."""
    with ExitStack() as stack:
        yield lambda engine, config=None: stack.enter_context(serving(engine, key_file[0], config))


@pytest.fixture
def ask(key_file: tuple[str, str]) -> Iterator[httpx.Client]:
    """An HTTP client with the key of `key_file`."""
    with httpx.Client(headers={"authorization": f"Bearer {key_file[1]}"}, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def connect() -> Callable[..., socket.socket]:
    """Send a request over a bare socket; see `_connect`."""
    return _connect


def _connect(url: str, key: str, content: dict[str, object], missing_bytes: int = 0) -> socket.socket:
    """A request over a bare socket, so that the test can end the connection when it wants to."""
    host, port = url.removeprefix("http://").split(":")
    payload = json.dumps(content).encode()
    head = f"POST /v1/anything/infer HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(payload)}\r\n"
    head += f"authorization: Bearer {key}\r\n\r\n"
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(head.encode() + payload[: len(payload) - missing_bytes])
    return connection
