"""Command line `anything`: serve a model or a set of replicas, manage keys, query a server.

torch is imported only to serve a model.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from anything.client import client_from_environment
from anything.http.app import create_app
from anything.http.serve import DrainingServer, bind, freeze_heap
from anything.keys import KEY_ENVIRONMENT, create_key, list_keys, load_keys, revoke_key
from anything.protocol import DEFAULT_MAX_TOKENS, Engine
from anything.router.routing import Router, read_routes
from anything.serve_config import ServeConfig
from base import storage
from base.config import Section, load, validate
from base.errors import ArgumentParser, MissingFileError, run_program

DEFAULT_KEY_FILE = os.path.join("~", ".config", "anything", "keys.json")


class _ServeFile(Section):
    """Section of a run's configuration that a server reads."""

    serve: ServeConfig = ServeConfig()


def parser() -> ArgumentParser:
    """Argument parser of `anything`."""
    root = ArgumentParser(prog="anything", description="Serve a model, and query it.")
    commands = root.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a model, or route to replicas")
    source = serve.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_path", metavar="URI", help="folder of safetensors in Hugging Face's layout")
    source.add_argument("--routes", metavar="FILE", help="routes.json of a front gateway; read again when replaced")
    serve.add_argument("--host", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (8080); 0 picks a free one")
    serve.add_argument("--port_file", metavar="FILE", help="write url, pid and port there as JSON once ready")
    serve.add_argument("--key_file", metavar="FILE", help=f"key hashes ({DEFAULT_KEY_FILE})")
    serve.add_argument("--config", metavar="FILE", help="YAML with a serve section, like a run's config.yaml")
    serve.add_argument("--model_version", metavar="NAME", help="version label of the answers (the folder's path)")
    key = commands.add_parser("key", help="make, list and revoke API keys").add_subparsers(dest="action", required=True)
    for name, text in (("create", "print a new key, once"), ("list", "ids, not keys"), ("revoke", "refuse a key")):
        action = key.add_parser(name, help=text)
        action.add_argument("--key_file", metavar="FILE", default=DEFAULT_KEY_FILE)
        if name == "revoke":
            action.add_argument("key_id")
    infer = commands.add_parser("infer", help=f"query a server; the key is read from {KEY_ENVIRONMENT}")
    infer.add_argument("prompt")
    infer.add_argument("--url", help="the server (ANYTHING_URL, else http://127.0.0.1:8080)")
    infer.add_argument("--max_tokens", type=int, default=DEFAULT_MAX_TOKENS)
    infer.add_argument("--temperature", type=float, default=0.0)
    infer.add_argument("--seed", type=int, help="sampling seed (random by default)")
    infer.add_argument("--stream", action="store_true", help="print the text as it is generated")
    return root


def serve_command(arguments: argparse.Namespace) -> None:
    """Run a server until a signal.

    Raises:
        PortInUseError: before the model is loaded.
        ConfigError, MissingFileError, WeightsError: the configuration, keys, routes or model are wrong.
    """
    config = _serve_config(arguments)
    keys = load_keys(_key_file(arguments.key_file), os.environ.get(KEY_ENVIRONMENT))
    listener = bind(config.host, config.port)
    try:
        engine = _engine(arguments, config)
        server = DrainingServer(create_app(engine, config, keys), listener, arguments.port_file)
        server.on_ready = freeze_heap
        server.run()
    finally:
        listener.close()


def _serve_config(arguments: argparse.Namespace) -> ServeConfig:
    config = load(arguments.config, _ServeFile, part_of_file=True).serve if arguments.config else ServeConfig()
    given = {name: getattr(arguments, name) for name in ("host", "port") if getattr(arguments, name) is not None}
    return validate({**config.model_dump(mode="json"), **given}, ServeConfig, origin="the command line")


def _key_file(given: str | None) -> str | None:
    """Path of the key file to serve with: the named one, else the default one if it exists."""
    if given is not None:
        return os.path.expanduser(given)
    default = os.path.expanduser(DEFAULT_KEY_FILE)
    return default if os.path.exists(default) else None


def _engine(arguments: argparse.Namespace, config: ServeConfig) -> Engine:
    if arguments.routes is not None:
        read_routes(arguments.routes)
        return Router(arguments.routes)
    uri: str = arguments.model_path
    if not storage.exists(storage.join(uri, "config.json")):
        raise MissingFileError(
            f"{uri} holds no model: there is no config.json. --model_path takes a folder in Hugging Face's layout, "
            "like a run's export/ or quantized/."
        )
    from anything.engine.embedded import EmbeddedEngine

    return EmbeddedEngine(uri, config.engine, version=arguments.model_version or uri.rstrip("/"))


def key_command(arguments: argparse.Namespace) -> None:
    """Create, list or revoke keys."""
    path = os.path.expanduser(arguments.key_file)
    if arguments.action == "create":
        key = create_key(path)
        print(key)
        print(f"Shown once; {path} keeps its hash. Give it to clients as {KEY_ENVIRONMENT}.", file=sys.stderr)
    elif arguments.action == "revoke":
        revoke_key(path, arguments.key_id)
        print(f"revoked {arguments.key_id}; servers that are started from now on refuse it", file=sys.stderr)
    else:
        for record in list_keys(path):
            print(record.key_id, "revoked" if record.revoked else "active")


def infer_command(arguments: argparse.Namespace) -> None:
    """Print the text that a server generates after a prompt."""
    options = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature, "seed": arguments.seed}
    with client_from_environment(arguments.url) as client:
        if not arguments.stream:
            print(client.infer(arguments.prompt, **options))
            return
        for text in client.stream(arguments.prompt, **options):
            print(text, end="", flush=True)
        print()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the `anything` console script."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return run_program(lambda: _dispatch(argv))


def _dispatch(argv: Sequence[str] | None) -> None:
    arguments = parser().parse_args(argv)
    commands = {"serve": serve_command, "key": key_command, "infer": infer_command}
    commands[arguments.command](arguments)


if __name__ == "__main__":
    raise SystemExit(main())
