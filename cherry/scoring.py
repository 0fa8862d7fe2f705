"""`python -m cherry.scoring`: held-out loss of every document under one model, as JSON.

Windows and scored tokens are those of cherry/heldout.py. Quantized weights are scored on the numbers of an engine that
follows their config.json: inputs of a layer are rounded where the format says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from base import storage
from base.config import load
from base.errors import ArgumentParser, ConfigError, run_program
from base.progress import print_progress
from cherry.data.prepare import HeldoutDocument, iterate_heldout, zlib_bits_per_byte
from cherry.heldout import model_score, paired_score, sums_of
from cherry.job_config import JobConfig
from model.numerics.modules import round_inputs_of
from model.quantization.check import check_quantized
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


def score(
    model: DeepseekV3,
    data_directory: str,
    *,
    documents: int,
    max_tokens: int,
    window: int,
    reference: DeepseekV3 | None = None,
) -> dict[str, Any]:
    """Scores per document, and totals: nats per token, bits per byte, and zlib's bits per byte on the same bytes.

    With a reference, each document also has `kl`, the sum of KL(reference || model) over its scored tokens in nats, and
    `agreed`, before how many of them both have the same likeliest token; the reference's own scores of the same
    documents are under `reference`.
    """
    started = time.perf_counter()
    bearing = (document for document in iterate_heldout(data_directory, max_tokens) if any(document.loss_mask))
    heldout = list(islice(bearing, documents))
    device = next(iter(model.state_dict().values())).device
    function = model_score(model, device) if reference is None else paired_score(model, reference, device)
    sums_DS = sums_of(
        function, heldout, window, lambda fraction: print_progress(f"scored {100 * fraction:.0f}%", fraction)
    )
    zlib = zlib_bits_per_byte(document.text for document in heldout)
    result = _totals(heldout, sums_DS[:, 0], zlib) | {"seconds": time.perf_counter() - started}
    if reference is not None:
        for document, [divergence, agreed] in zip(result["documents"], sums_DS[:, 2:].tolist(), strict=True):
            document |= {"kl": divergence, "agreed": round(agreed)}
        result["reference"] = _totals(heldout, sums_DS[:, 1], zlib)
    return result


def _totals(heldout: Sequence[HeldoutDocument], nll_D: Tensor, zlib: float) -> dict[str, Any]:
    rows = [
        {"id": document.id, "nll": nll, "tokens": sum(document.loss_mask), "bytes": document.bytes}
        for document, nll in zip(heldout, nll_D.tolist(), strict=True)
    ]
    nll, tokens, size = (sum(row[key] for row in rows) for key in ("nll", "tokens", "bytes"))
    return {
        "documents": rows,
        "loss": nll / max(1, tokens),
        "bits_per_byte": nll / math.log(2) / max(1, size),
        "zlib_bits_per_byte": zlib,
        "tokens": tokens,
        "bytes": size,
    }


def main() -> None:
    """Entry point of `python -m cherry.scoring`."""
    parser = ArgumentParser(prog="python -m cherry.scoring", description=__doc__)
    parser.add_argument("--model_path", help="a Hugging Face folder or URI, quantized or not")
    parser.add_argument("--untrained", action="store_true", help="score the initial weights of --config")
    parser.add_argument("--reference", help="the folder that --model_path was quantized from, to score beside it")
    parser.add_argument("--config")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument("--max_tokens", type=int, required=True)
    options = parser.parse_args()
    if options.reference is not None and options.model_path is not None:
        check_quantized(options.reference, options.model_path)
    model = load_model(None if options.untrained else options.model_path, options.config)
    round_inputs_of(model)
    reference = None if options.reference is None else load_model(options.reference, None)
    window = storage.read_json(storage.join(options.data_dir, "manifest.json"))["sequence_length"]
    limits = {"documents": options.documents, "max_tokens": options.max_tokens, "window": window}
    result = score(model, options.data_dir, reference=reference, **limits)
    result = {"model": "untrained" if options.untrained else options.model_path, **result}
    storage.write_json(options.output, result)
    print(f"loss {result['loss']:.4f} nats/token, {result['bits_per_byte']:.4f} bits/byte", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
