"""Owns int8 weights: symmetric, one scale per output channel, written shard by shard with an error report.

It knows nothing of held-out loss: how good the result is, an evaluation says. On disk it is compressed-tensors'
"int-quantized" W8A8 (static weights per channel, dynamic activations per token), as that library reads it. Our engine
and our evaluation keep activations as they are; an engine that follows the configuration, like vLLM, rounds them to
int8 as well, so what int8 costs there must be measured there.
Router, norms, embeddings, head, eh_proj and biases keep their type.

    python -m model.quantize --source <folder> --target <folder>
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from base import storage
from base.errors import ArgumentParser, InvalidInputError, WeightsError, run_program
from base.progress import print_progress
from model.weights.hf_names import is_projection
from model.weights.pretrained import WeightsReader, read_model_config, write_index
from model.weights.safetensors_file import write_file

REPORT_NAME = "quantization.json"
# What compressed-tensors must leave alone among the linear layers.
_IGNORED_LAYERS = ["lm_head", "re:.*mlp\\.gate$", "re:.*eh_proj$", "re:.*shared_head.*"]
_INT8_MAX = 127
# Everything else of a folder is copied; these are written anew.
_WRITTEN = ("config.json", "model.safetensors.index.json", storage.MARKER)

Progress = Callable[[str, float], None]


def is_quantized(hf_name: str) -> bool:
    """Whether the released tensor of this name becomes int8."""
    return is_projection(hf_name)


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values [O, I] and fp32 scales [O, 1] with weight ~ values * scale.

    The scale is the row's largest magnitude over 127, so the error is at most half a scale. A row of zeros gets
    scale 1.
    """
    weight_OI = weight_OI.float()
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / _INT8_MAX
    scale_O1 = torch.where(scale_O1 > 0, scale_O1, torch.ones_like(scale_O1))
    values_OI = (weight_OI / scale_O1).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return values_OI, scale_O1


def quantize_folder(source_uri: str, target_uri: str, on_progress: Progress | None = None) -> dict[str, Any]:
    """Quantize a folder into another one, one shard at a time; the marker comes last.

    Args:
        on_progress: called with a line for people and the fraction done after each shard.

    Returns:
        The report, also in quantization.json: `tensors` with name, shape, rel_error (Frobenius) and
        max_abs_error of each quantized one; bytes_before, bytes_after (weights only) and their ratio.

    Raises:
        MissingFileError, WeightsError: the source cannot be read, or is quantized already (fp8 in DeepSeek's own
            format is taken).
        InvalidInputError: source and target are the same folder.
        DiskFullError, StorageError: a file could not be written. The target stays without a marker.
    """
    if source_uri.rstrip("/") == target_uri.rstrip("/"):
        raise InvalidInputError(f"source and target are both {source_uri}: name another folder for the result")
    _, raw_config = read_model_config(source_uri)
    method = (raw_config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "fp8"):
        raise WeightsError(f"{source_uri} is quantized already ({method}). Name the folder with the plain weights.")
    reader = WeightsReader(source_uri)
    storage.remove_tree(target_uri)
    storage.make_directory(target_uri)
    report: dict[str, Any] = {"format": "int8, symmetric, per output channel", "bytes_before": 0, "bytes_after": 0}
    errors: list[dict[str, Any]] = []
    file_of: dict[str, str] = {}
    for number, file in enumerate(reader.files, start=1):
        tensors, shard_errors = _quantize_shard(reader, file)
        report["bytes_before"] += sum(_bytes(reader, name) for name in reader.names_in(file))
        report["bytes_after"] += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        write_file(storage.join(target_uri, file), tensors)
        file_of |= dict.fromkeys(tensors, file)
        errors += shard_errors
        reader.close(file)
        if on_progress is not None:
            on_progress(f"quantized {number}/{len(reader.files)} shards ({file})", number / len(reader.files))
    report |= {"ratio": report["bytes_after"] / report["bytes_before"], **_worst(errors), "tensors": errors}
    _finish(source_uri, target_uri, raw_config, file_of, report)
    return report


def _quantize_shard(reader: WeightsReader, file: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    errors: list[dict[str, Any]] = []
    for name in reader.names_in(file):
        if reader.is_scale(name):
            continue
        tensor = reader.read_weight(name)
        if not is_quantized(name):
            tensors[name] = tensor
            continue
        values, scale = quantize(tensor)
        tensors[name], tensors[f"{name}_scale"] = values, scale
        errors.append({"name": name, "shape": list(tensor.shape), **_error(tensor, values, scale)})
    return tensors, errors


def _error(weight: Tensor, values: Tensor, scale: Tensor) -> dict[str, float]:
    weight = weight.float()
    difference = values * scale - weight
    norm = weight.norm().item()
    return {
        "rel_error": difference.norm().item() / norm if norm else 0.0,
        "max_abs_error": difference.abs().max().item(),
    }


def _worst(errors: list[dict[str, Any]]) -> dict[str, Any]:
    if not errors:
        return {"quantized_tensors": 0}
    worst = max(errors, key=lambda item: float(item["rel_error"]))
    mean = sum(float(item["rel_error"]) for item in errors) / len(errors)
    return {
        "quantized_tensors": len(errors),
        "mean_rel_error": mean,
        "worst_rel_error": worst["rel_error"],
        "worst_tensor": worst["name"],
    }


def _bytes(reader: WeightsReader, name: str) -> int:
    info = reader.info(name)
    return info.stop - info.start


def _finish(
    source_uri: str, target_uri: str, raw_config: dict[str, Any], file_of: dict[str, str], report: dict[str, Any]
) -> None:
    write_index(target_uri, file_of)
    for name in storage.list_names(source_uri):
        if name.endswith((".json", ".jinja", ".model")) and name not in _WRITTEN:
            storage.write_bytes(storage.join(target_uri, name), storage.read_bytes(storage.join(source_uri, name)))
    storage.write_json(storage.join(target_uri, REPORT_NAME), report)
    config = {**raw_config, "quantization_config": quantization_config()}
    storage.write_json(storage.join(target_uri, "config.json"), config)
    record = {"source": source_uri, "ratio": report["ratio"], "quantized_tensors": report["quantized_tensors"]}
    storage.commit(target_uri, record)


def quantization_config() -> dict[str, Any]:
    """The `quantization_config` of config.json, as compressed-tensors 0.12 writes it for W8A8 (int8).

    int8 values without activations' scheme would be what we evaluate, but engines have kernels for such weights only in
    the packed format (32-bit words), which our reader does not have.
    """
    common = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "block_structure": None}
    weights = {**common, "strategy": "channel", "dynamic": False, "observer": "minmax", "actorder": None}
    activations = {**common, "strategy": "token", "dynamic": True, "observer": None, "actorder": None}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": "int-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": _IGNORED_LAYERS,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def main() -> None:
    """Quantize the folder `--source` into `--target` and print how it went."""
    parser = ArgumentParser(prog="python -m model.quantize", description="int8 weights, shard by shard")
    parser.add_argument("--source", required=True, help="folder or URI in Hugging Face's layout")
    parser.add_argument("--target", required=True, help="folder or URI to write")
    arguments = parser.parse_args()
    report = quantize_folder(
        arguments.source, arguments.target, lambda line, fraction: print_progress(f"{fraction:4.0%} {line}", fraction)
    )
    print(
        f"{report['quantized_tensors']} tensors, {report['bytes_before']:,} -> {report['bytes_after']:,} bytes "
        f"({report['ratio']:.3f}), mean relative error {report.get('mean_rel_error', 0.0):.2%}; "
        f"report in {storage.join(arguments.target, REPORT_NAME)}"
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
