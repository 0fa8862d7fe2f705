"""`python -m cherry.scoring`: held-out loss of every document under one model, as JSON.

Windows and scored tokens are those of cherry/heldout.py.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from base import storage
from base.config import load
from base.errors import ArgumentParser, ConfigError, run_program
from base.progress import print_progress
from cherry.data.prepare import iterate_heldout, zlib_bits_per_byte
from cherry.heldout import model_score, score_documents
from cherry.job_config import JobConfig
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained


def load_model(model_path: str | None, config_path: str | None) -> DeepseekV3:
    """Model at `model_path`; without one, the untrained model of a config (its initial weights).

    Raises:
        ConfigError: neither is given.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if model_path is not None:
        return load_pretrained(model_path, dtype=dtype, device=device).eval()
    if config_path is None:
        raise ConfigError("scoring needs --model_path, or --untrained with --config")
    config = load(config_path, JobConfig, part_of_file=True)
    model = DeepseekV3(config.model)
    model.init_weights(config.seed)
    return model.to(device, dtype).eval()


def score(model: DeepseekV3, data_directory: str, *, documents: int, max_tokens: int, window: int) -> dict[str, Any]:
    """Scores per document, and totals: nats per token, bits per byte, and zlib's bits per byte on the same bytes."""
    started = time.perf_counter()
    bearing = (document for document in iterate_heldout(data_directory, max_tokens) if any(document.loss_mask))
    heldout = list(islice(bearing, documents))
    device = next(model.parameters()).device
    scores = score_documents(
        model_score(model, device),
        heldout,
        window,
        lambda fraction: print_progress(f"scored {100 * fraction:.0f}%", fraction),
    )
    nll, tokens, size = (sum(getattr(s, key) for s in scores) for key in ("nll", "tokens", "bytes"))
    return {
        "documents": [asdict(s) for s in scores],
        "loss": nll / max(1, tokens),
        "bits_per_byte": nll / math.log(2) / max(1, size),
        "zlib_bits_per_byte": zlib_bits_per_byte(document.text for document in heldout),
        "tokens": tokens,
        "bytes": size,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Entry point of `python -m cherry.scoring`."""
    parser = ArgumentParser(prog="python -m cherry.scoring", description=__doc__)
    parser.add_argument("--model_path", help="a Hugging Face folder or URI, quantized or not")
    parser.add_argument("--untrained", action="store_true", help="score the initial weights of --config")
    parser.add_argument("--config")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument("--max_tokens", type=int, required=True)
    options = parser.parse_args()
    model = load_model(None if options.untrained else options.model_path, options.config)
    window = storage.read_json(storage.join(options.data_dir, "manifest.json"))["sequence_length"]
    result = score(model, options.data_dir, documents=options.documents, max_tokens=options.max_tokens, window=window)
    result = {"model": "untrained" if options.untrained else options.model_path, **result}
    storage.write_json(options.output, result)
    print(f"loss {result['loss']:.4f} nats/token, {result['bits_per_byte']:.4f} bits/byte", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
