"""Plan of a quantization: which groups of weights each file of the target holds, from names alone."""

from __future__ import annotations

from model.numerics.formats import QuantizationFormat
from model.weights.reader import WeightsReader

Groups = list[list[str]]
"""Released names of weights that are quantized together, a list a group; one that keeps its type is a group of one."""


def plan_groups(reader: WeightsReader, quantization: QuantizationFormat) -> dict[str, Groups]:
    """Groups of weights that each file of the target holds, by the file's name.

    A group is written to the file in which its first member is stored; its other members are read from theirs. Every
    file's groups can be quantized by themselves, by any worker.
    """
    plan: dict[str, Groups] = {}
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
