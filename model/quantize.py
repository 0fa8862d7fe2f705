"""Quantization of a weights folder: file by file, in any registered format, with an error report.

Weights that the format does not quantize keep their type. The loss that quantization costs is measured elsewhere, by an
evaluation.

    python -m model.quantize --source <folder> --target <folder> [--format <name>]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from base import storage
from base.errors import ArgumentParser, InvalidInputError, WeightsError, run_program
from base.progress import print_progress
from base.storage import Progress
from model.numerics.formats import DEFAULT_FORMAT, QuantizationFormat, find_format, is_release_fp8, quantized_config
from model.weights.pretrained import WeightsReader, read_model_config, write_index
from model.weights.safetensors_file import write_file

REPORT_NAME = "quantization.json"
# Every other file of a folder is copied; these are written anew.
_WRITTEN = ("config.json", "model.safetensors.index.json", storage.MARKER)


def quantize_folder(
    source_uri: str,
    target_uri: str,
    on_progress: Progress | None = None,
    *,
    format_name: str = DEFAULT_FORMAT,
) -> dict[str, Any]:
    """Quantize a folder into another one, one file at a time; the marker is written last.

    Args:
        on_progress: called with a line for people and the fraction done after each file.
        format_name: one of `model.numerics.formats.FORMATS`.

    Returns:
        The report, also in quantization.json: `tensors` with name, shape, rel_error (Frobenius) and
        max_abs_error of each quantized one; bytes_before, bytes_after (weights only) and their ratio.

    Raises:
        MissingFileError, WeightsError: the source cannot be read, or is quantized already (fp8 in DeepSeek's own
            format is dequantized first).
        InvalidInputError: source and target are the same folder.
        ConfigError: no such format, or the model's sizes do not fit it.
        DiskFullError, StorageError: a file could not be written. The target stays without a marker.
    """
    entry = find_format(format_name)
    if source_uri.rstrip("/") == target_uri.rstrip("/"):
        raise InvalidInputError(f"source and target are both {source_uri}: name another folder for the result")
    model_config, raw_config = read_model_config(source_uri)
    described = raw_config.get("quantization_config")
    if described and not is_release_fp8(described):
        method = described.get("quant_method")
        raise WeightsError(f"{source_uri} is quantized already ({method}). Name the folder with the plain weights.")
    quantization = entry.load(model_config)
    reader = WeightsReader(source_uri)
    storage.remove_tree(target_uri)
    storage.make_directory(target_uri)
    report: dict[str, Any] = {"format": entry.description, "bytes_before": 0, "bytes_after": 0}
    errors: list[dict[str, Any]] = []
    file_of: dict[str, str] = {}
    plan = plan_groups(reader, quantization)
    for number, (file, groups) in enumerate(plan.items(), start=1):
        tensors, file_errors = quantize_groups(reader, quantization, groups)
        report["bytes_before"] += sum(_bytes(reader, name) for name in reader.names_in(file))
        report["bytes_after"] += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        if tensors:
            write_file(storage.join(target_uri, file), tensors)
        file_of |= dict.fromkeys(tensors, file)
        errors += file_errors
        reader.close(file)
        if on_progress is not None:
            on_progress(f"quantized {number}/{len(plan)} shards ({file})", number / len(plan))
    report |= {"ratio": report["bytes_after"] / report["bytes_before"], **_worst(errors), "tensors": errors}
    _finish(source_uri, target_uri, quantized_config(raw_config, quantization), file_of, report)
    return report


def plan_groups(reader: WeightsReader, quantization: QuantizationFormat) -> dict[str, list[list[str]]]:
    """Groups of weights that each file of the target holds, from names alone.

    A group is written to the file in which its first member is stored; its other members are read from theirs. Weights
    that keep their type are groups of one. Every file's groups can be quantized by themselves, by any worker.
    """
    plan: dict[str, list[list[str]]] = {}
    groups: dict[str, list[str]] = {}
    for file in reader.files:
        plan[file] = []
        for name in reader.names_in(file):
            if reader.is_scale(name):
                continue
            key = quantization.group(name)
            if key is not None and key in groups:
                groups[key].append(name)
                continue
            members = [name]
            plan[file].append(members)
            if key is not None:
                groups[key] = members
    return plan


def quantize_groups(
    reader: WeightsReader, quantization: QuantizationFormat, groups: list[list[str]]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors to store for these groups, by name, and the errors of those that were quantized."""
    tensors: dict[str, Tensor] = {}
    errors: list[dict[str, Any]] = []
    for names in groups:
        weights = {name: reader.read_weight(name) for name in names}
        if quantization.group(names[0]) is None:
            tensors |= weights
            continue
        stored = quantization.quantize(weights)
        tensors |= stored
        errors += _errors(weights, quantization.dequantize(stored))
    return tensors, errors


def _errors(weights: Mapping[str, Tensor], restored: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    errors = []
    for name, stored_weight in weights.items():
        weight = stored_weight.float()
        difference = restored[name] - weight
        norm = weight.norm().item()
        errors.append(
            {
                "name": name,
                "shape": list(weight.shape),
                "rel_error": difference.norm().item() / norm if norm else 0.0,
                "max_abs_error": difference.abs().max().item(),
            }
        )
    return errors


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
    source_uri: str, target_uri: str, config: dict[str, Any], file_of: dict[str, str], report: dict[str, Any]
) -> None:
    """Write the index, copied files, the report and config.json beside the weights, and the marker last."""
    write_index(target_uri, file_of)
    for name in storage.list_names(source_uri):
        if name.endswith((".json", ".jinja", ".model")) and name not in _WRITTEN:
            storage.write_bytes(storage.join(target_uri, name), storage.read_bytes(storage.join(source_uri, name)))
    storage.write_json(storage.join(target_uri, REPORT_NAME), report)
    storage.write_json(storage.join(target_uri, "config.json"), config)
    record = {"source": source_uri, "ratio": report["ratio"], "quantized_tensors": report["quantized_tensors"]}
    storage.commit(target_uri, record)


def main() -> None:
    """Quantize the folder `--source` into `--target`, and print progress and the mean error."""
    parser = ArgumentParser(prog="python -m model.quantize", description="quantize a weights folder, file by file")
    parser.add_argument("--source", required=True, help="folder or URI in Hugging Face's layout")
    parser.add_argument("--target", required=True, help="folder or URI to write")
    parser.add_argument("--format", default=DEFAULT_FORMAT, help=f"quantization format ({DEFAULT_FORMAT})")
    arguments = parser.parse_args()
    report = quantize_folder(
        arguments.source,
        arguments.target,
        lambda line, fraction: print_progress(f"{fraction:4.0%} {line}", fraction),
        format_name=arguments.format,
    )
    print(
        f"{report['quantized_tensors']} tensors, {report['bytes_before']:,} -> {report['bytes_after']:,} bytes "
        f"({report['ratio']:.3f}), mean relative error {report.get('mean_rel_error', 0.0):.2%}; "
        f"report in {storage.join(arguments.target, REPORT_NAME)}"
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
