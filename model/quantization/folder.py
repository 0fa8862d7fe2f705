"""Quantization of a weights folder into another one: what an earlier start finished is kept, the marker comes last."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from base import storage
from base.errors import InvalidInputError, WeightsError
from base.storage import Progress
from model.model_config import ModelConfig
from model.numerics.formats import DEFAULT_FORMAT, QuantizationFormat, find_format, is_release_fp8, quantized_config
from model.quantization.calibrated import CalibratedFormat, Calibrating, Calibration, check_method, discard_work
from model.quantization.manifest import MANIFEST_NAME, Manifest, describe_origin, difference, is_whole
from model.quantization.meter import Meter
from model.quantization.plan import Groups, plan_groups
from model.quantization.report import REPORT_NAME, make_report
from model.quantization.shard import quantize_shard
from model.quantization.workers import Event, available_cores, quantize_in_workers
from model.weights.pretrained import WeightsReader, read_model_config, write_index

# Every other file of a folder is copied; these are written anew.
_WRITTEN = ("config.json", "model.safetensors.index.json", storage.MARKER, REPORT_NAME)
_COPIED = (".json", ".jinja", ".model")
# Of the time that a calibrated quantization takes, about; the rest is writing.
_CALIBRATION_SHARE = 0.9


def quantize_folder(
    source_uri: str,
    target_uri: str,
    on_progress: Progress | None = None,
    *,
    format_name: str = DEFAULT_FORMAT,
    workers: int | None = None,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Quantize a folder into another one, a shard at a time and worker; the marker is written last.

    A target that an earlier call left unfinished is gone on with, if source, format, calibration and code are the same:
    layers that are calibrated and shards that are still as they were written stay. A finished one of the same is only
    checked. Any other is started over.

    Args:
        on_progress: called with a line for people and the fraction done, at least after each shard.
        format_name: one of `model.numerics.formats.FORMATS`.
        workers: processes, each with one shard in memory; `None` works in this process alone.
        calibration: of the format's int4 weights; `None` rounds them to the nearest.

    Returns:
        The report, also in quantization.json; see `make_report`.

    Raises:
        MissingFileError, WeightsError: the source cannot be read, or is quantized already (fp8 in DeepSeek's own
            format is dequantized first).
        InvalidInputError: source and target are the same folder, the target holds something else, or the calibration's
            tokens are not the model's.
        ConfigError: no such format, the model's sizes do not fit it, or it has no int4 weights to calibrate.
        DiskFullError, StorageError, WorkerLostError: a file could not be written, or a worker was killed. The target
            stays without a marker, and the same call goes on.
    """
    entry = find_format(format_name)
    if calibration is not None:
        check_method(calibration.method, format_name)
    model_config, raw_config = _check(source_uri, target_uri)
    plain, tell = entry.load(model_config), on_progress or (lambda line, fraction: None)
    calibrating = None if calibration is None else Calibrating(source_uri, target_uri, calibration, plain)
    identity = None if calibrating is None else calibrating.identity()
    origin = describe_origin(source_uri, format_name, plain.quantization_config, identity)
    if (report := _finished(target_uri, origin, tell)) is None:
        reader, manifest = WeightsReader(source_uri), Manifest(target_uri)
        plan = plan_groups(reader, plain)
        records = _begin(manifest, origin, plan, workers or available_cores(), tell)
        quantization, tell_shards = plain, tell
        if calibrating is not None:
            quantization = calibrating.run(_part(tell, 0.0, _CALIBRATION_SHARE))
            tell_shards = _part(tell, _CALIBRATION_SHARE, 1.0)
        meter = Meter({file: origin["files"].get(file, [0])[0] for file in plan}, set(records), tell_shards)
        open_plan = {file: groups for file, groups in plan.items() if file not in records}
        _work(_events(reader, target_uri, format_name, quantization, open_plan, workers), manifest, records, meter)
        details = None if calibrating is None else calibrating.report()
        report = make_report(entry.description, [records[file] for file in plan], details)
        write_index(target_uri, {name: file for file in plan for name in records[file]["names"]})
        _commit(source_uri, target_uri, quantized_config(raw_config, plain), report, origin)
    Manifest(target_uri).remove()
    discard_work(target_uri)
    return report


def _part(tell: Progress, first: float, last: float) -> Progress:
    """Progress of a part of the work, as progress of the whole."""
    return lambda line, fraction: tell(line, first + (last - first) * fraction)


def _work(
    events: Generator[Event, None, None], manifest: Manifest, records: dict[str, dict[str, Any]], meter: Meter
) -> None:
    """Note each shard that is finished in the manifest and in `records`, until all are."""
    try:
        with closing(events):
            for kind, file, value in events:
                if kind == "read":
                    meter.read(file, value)
                    continue
                manifest.add(value)
                records[file] = value
                meter.finish(file)
    finally:
        _remove_parts(manifest.target_uri)


def default_workers(source_uri: str) -> int | None:
    """Workers that suit a source: a process a core, at most its shards; `None`, this process alone, for a small one.

    Starting a process takes longer than quantizing 64 MiB.
    """
    shards = [file.bytes for file in storage.find(source_uri) if re.fullmatch(r"[^/]*\.safetensors", file.name)]
    if sum(shards) < 64 << 20:
        return None
    return min(available_cores(), len(shards))


def _check(source_uri: str, target_uri: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The source's model, and its config.json.

    Raises:
        MissingFileError, WeightsError, InvalidInputError: see `quantize_folder`.
    """
    if source_uri.rstrip("/") == target_uri.rstrip("/"):
        raise InvalidInputError(f"source and target are both {source_uri}: name another folder for the result")
    model_config, raw_config = read_model_config(source_uri)
    described = raw_config.get("quantization_config")
    if described and not is_release_fp8(described):
        method = described.get("quant_method")
        raise WeightsError(f"{source_uri} is quantized already ({method}). Name the folder with the plain weights.")
    _check_target(target_uri)
    return model_config, raw_config


def _check_target(target_uri: str) -> None:
    """Refuse to overwrite what no quantization wrote.

    Raises:
        InvalidInputError: it holds other files, folders, or weights without a report of quantization.
    """
    names = storage.list_names(target_uri)
    own = (".safetensors", ".tmp", ".png", ".csv", *_COPIED)
    foreign = [name for name in names if name not in (MANIFEST_NAME, storage.MARKER) and not name.endswith(own)]
    if "config.json" in names and not {REPORT_NAME, MANIFEST_NAME} & set(names):
        foreign.append("config.json")
    if foreign:
        raise InvalidInputError(
            f"{target_uri} holds what no quantization wrote ({foreign[0]}), and would be emptied. Name a new folder "
            "for the result, or remove this one."
        )


def _finished(target_uri: str, origin: Mapping[str, Any], tell: Progress) -> dict[str, Any] | None:
    """The report of a target that is committed, made from the same, and whole; `None` for any other."""
    if not storage.is_committed(target_uri):
        return None
    changed = difference(origin, storage.read_commit(target_uri).get("made_from") or {})
    if changed is None and not storage.damage(target_uri):
        report: dict[str, Any] = storage.read_json(storage.join(target_uri, REPORT_NAME))
        sizes = {file.name: file.bytes for file in storage.find(target_uri)}
        shards = report["shards"].items()
        if all(is_whole(storage.join(target_uri, file), state, sizes.get(file)) for file, state in shards):
            tell(f"{target_uri} is finished: made from the same source in the same format, and whole", 1.0)
            return report
    why = f"was made from {changed}" if changed else "is no longer as it was committed"
    tell(f"{target_uri} {why}: starting over", 0.0)
    return None


def _begin(
    manifest: Manifest, origin: dict[str, Any], plan: Mapping[str, Groups], threads: int, tell: Progress
) -> dict[str, dict[str, Any]]:
    """Records of the shards that an earlier start finished; everything else in the target is removed."""
    target_uri = manifest.target_uri
    earlier = None if storage.is_committed(target_uri) else manifest.origin()
    changed = None if earlier is None else difference(origin, earlier)
    if earlier is not None and changed is None:
        records = manifest.finished(plan, threads)
        tell(f"resumed: {len(records)} of {len(plan)} shards are there, checked by size and digest", 0.0)
        kept = {*records, MANIFEST_NAME}
        for name in storage.list_names(target_uri):
            if name not in kept:
                storage.remove_tree(storage.join(target_uri, name))
        return records
    if changed is not None:
        tell(f"{target_uri} was begun from {changed}: starting over", 0.0)
    storage.remove_tree(target_uri)
    storage.make_directory(target_uri)
    manifest.begin(origin)
    return {}


def _remove_parts(target_uri: str) -> None:
    """Remove what workers that were ended left of files in work, which may be why a disk is full."""
    if storage.is_local(target_uri):
        for path in Path(storage.local_path(target_uri)).glob("*.tmp"):
            path.unlink(missing_ok=True)


def _events(
    reader: WeightsReader,
    target_uri: str,
    format_name: str,
    quantization: QuantizationFormat,
    plan: Mapping[str, Groups],
    workers: int | None,
) -> Generator[Event, None, None]:
    """Events of quantizing all files of `plan`, in this process or in workers."""
    if workers is not None and plan:
        calibration = quantization.work_directory if isinstance(quantization, CalibratedFormat) else None
        yield from quantize_in_workers(reader.uri, target_uri, format_name, plan, min(workers, len(plan)), calibration)
        return
    if workers is None:
        for file, groups in plan.items():
            yield "done", file, quantize_shard(reader, target_uri, quantization, file, groups)


def _commit(
    source_uri: str, target_uri: str, config: dict[str, Any], report: dict[str, Any], origin: Mapping[str, Any]
) -> None:
    """Write copied files, the report and config.json beside the weights and their index, and the marker last."""
    for name in storage.list_names(source_uri):
        if name.endswith(_COPIED) and name not in _WRITTEN:
            storage.write_bytes(storage.join(target_uri, name), storage.read_bytes(storage.join(source_uri, name)))
    storage.write_json(storage.join(target_uri, REPORT_NAME), report)
    storage.write_json(storage.join(target_uri, "config.json"), config)
    # The manifest goes after the marker, so that a kill between them costs nothing.
    stored = storage.stored_files(target_uri)
    own = {name: state for name, state in stored.items() if not name.startswith(f"{MANIFEST_NAME}/")}
    record = {"source": source_uri, "ratio": report["ratio"], "quantized_tensors": report["quantized_tensors"]}
    storage.commit(target_uri, {"files": own, "made_from": origin, **record})
