"""Check of a quantized folder against what it was made from: names, shapes, types, and what fused weights share.

It reads headers, and of joint schemes the one number that a group shares. Engines fuse gate_proj with up_proj and give
both one scale; a folder in which these differ loads, and is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from base import storage
from base.errors import WeightsError
from model.numerics.formats import FORMATS, detect_format
from model.numerics.scheme_format import SchemeFormat
from model.numerics.schemes import Entry, Scheme
from model.quantization.plan import plan_groups
from model.weights.pretrained import read_model_config
from model.weights.reader import WeightsReader

_SHOWN = 5
# Shared by the weights of a group of a joint scheme.
_SHARED = "_global_scale"


def check_quantized(source_uri: str, target_uri: str) -> None:
    """Return when every weight of the source is in the target as the target's config.json says.

    Raises:
        WeightsError: it is not; names the first tensors that are missing, that nobody asked for, that have another
            shape or type, or that do not share what their group must.
        MissingFileError, ConfigError: one of the folders cannot be read.
    """
    config, raw_config = read_model_config(target_uri)
    name = detect_format(raw_config, storage.join(target_uri, "config.json"))
    quantization = None if name is None else FORMATS[name].load(config)
    source, target = WeightsReader(source_uri), WeightsReader(target_uri)
    if not isinstance(quantization, SchemeFormat):
        problems = _differences(_plain(source), target)
    else:
        problems = [*_differences(_expected(source, quantization), target), *_unshared(source, target, quantization)]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise WeightsError(
            f"{target_uri} is not {source_uri} quantized as its config.json says: {'; '.join(problems[:_SHOWN])}"
            f"{more}. Quantize the plain weights again."
        )


def _plain(source: WeightsReader) -> dict[str, tuple[int, ...] | Entry]:
    return {name: source.shape(name) for name in source.names if not source.is_scale(name)}


def _expected(source: WeightsReader, quantization: SchemeFormat) -> dict[str, tuple[int, ...] | Entry]:
    """What the target must hold, by name: shape and type, or the shape alone of what keeps its type."""
    expected: dict[str, tuple[int, ...] | Entry] = {}
    for name, shape in _plain(source).items():
        if (scheme := quantization.scheme(name)) is None:
            expected[name] = shape
        else:
            assert not isinstance(shape, Entry)
            rows, columns = shape
            expected |= {name + suffix: entry for suffix, entry in scheme.entries(rows, columns).items()}
    return expected


def _differences(expected: dict[str, tuple[int, ...] | Entry], target: WeightsReader) -> list[str]:
    found = [f"{name} is missing" for name in expected if name not in target]
    found += [f"{name} is not expected" for name in target.names if name not in expected]
    for name, entry in expected.items():
        if name not in target:
            continue
        shape = entry.shape if isinstance(entry, Entry) else entry
        if target.shape(name) != shape:
            found.append(f"{name} must have the shape {list(shape)} (got {list(target.shape(name))})")
        elif isinstance(entry, Entry) and target.dtype(name) != entry.dtype:
            found.append(f"{name} must be of {entry.dtype} (got {target.dtype(name)})")
    return found


def _unshared(source: WeightsReader, target: WeightsReader, quantization: SchemeFormat) -> Iterator[str]:
    """Weights of a group that do not share its scale."""
    for groups in plan_groups(source, quantization).values():
        for first, *others in groups:
            scheme = quantization.scheme(first)
            if scheme is None or not _shares(scheme) or first + _SHARED not in target:
                continue
            shared = target.read_weight(first + _SHARED)
            for other in others:
                if other + _SHARED in target and not torch.equal(target.read_weight(other + _SHARED), shared):
                    yield f"{other}{_SHARED} must equal that of {first}, which it is fused with"


def _shares(scheme: Scheme) -> bool:
    return scheme.joint and _SHARED in scheme.entries(1, 16)
