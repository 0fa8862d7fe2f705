"""config.json, index and safetensors headers of any content are read, or refused by an error that names the file."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base.errors import CherryError
from model.model_config import ModelConfig
from model.weights.hf_config import config_from_hf
from model.weights.pretrained import load_pretrained

RELEASES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "released_configs.json").read_text())
# derandomize: the same examples each time, so that a failure is of the change that is tested.
FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(10**30)]),
    st.floats(),
    st.text(max_size=6),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner))


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """A released config.json with some of its keys, or of those inside them, changed, left out or added."""
    raw = json.loads(json.dumps(draw(st.sampled_from(list(RELEASES.values())))))
    for _ in range(draw(st.integers(1, 3))):
        place = raw
        inner = [key for key, value in place.items() if isinstance(value, dict)]
        if inner and draw(st.booleans()):
            place = place[draw(st.sampled_from(inner))]
        key = draw(st.sampled_from([*place, "head_dim", "num_local_experts"]) | st.text(max_size=6))
        if draw(st.booleans()):
            place[key] = draw(values)
        else:
            place.pop(key, None)
    return raw


@given(raw=configs() | values)
@settings(FUZZ, max_examples=1500)
def test_a_config_is_read_or_refused_by_name(raw: Any) -> None:
    try:
        assert isinstance(config_from_hf(raw, "folder/config.json"), ModelConfig)
    except CherryError as error:
        assert "folder/config.json" in str(error)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model in two files, which must not be changed."""
    from tests.model.conftest import random_model, small_config
    from tests.model.weights.conftest import write_export

    folder = tmp_path_factory.mktemp("weights") / "export"
    write_export(random_model(small_config(num_hidden_layers=1, num_nextn_predict_layers=0)), str(folder))
    return folder


def load_or_refuse(good: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    """Load a copy of the folder with one file damaged; anything but an error of the family is raised."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "folder"
        shutil.copytree(good, folder)
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
        try:
            load_pretrained(str(folder), dtype=torch.float32)
        except CherryError as error:
            assert str(folder) in str(error)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header of a safetensors file, and the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def header_changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of one entry in a header, or of the header as a whole."""
    choice = draw(st.integers(0, 4))
    value, position = draw(values), draw(st.integers(0, 30))
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))

    def change(data: bytes) -> bytes:
        header, tensors = header_of(data)
        name = sorted(header)[position % len(header)]
        if choice == 0:
            header[name] = value
        elif choice == 1 and isinstance(header[name], dict):
            header[name][key] = value
        elif choice == 2 and isinstance(entry := header[name], dict) and isinstance(entry.get(key), list):
            entry[key] = [value, *entry[key][1:]]
        elif choice == 3:
            header.pop(name)
        whole: Any = value if choice == 4 else header
        text = json.dumps(whole).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + tensors

    return change


@given(change=header_changes(), second=st.booleans())
@settings(FUZZ, max_examples=250)
def test_a_header_is_read_or_refused_by_name(good: Path, change: Callable[[bytes], bytes], second: bool) -> None:
    files = sorted(path.name for path in good.glob("*.safetensors"))
    load_or_refuse(good, files[-1 if second else 0], change)


@given(
    name=st.sampled_from(["config.json", "model.safetensors.index.json"]),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=3)), min_size=1, max_size=4),
    end=st.none() | st.integers(0, 4000),
)
@settings(FUZZ, max_examples=250)
def test_a_json_file_of_any_bytes_is_read_or_refused(
    good: Path, name: str, changes: list[tuple[int, bytes]], end: int | None
) -> None:
    def damage(data: bytes) -> bytes:
        for place, new in changes:
            place %= len(data)
            data = data[:place] + new + data[place + len(new) :]
        return data[:end]

    load_or_refuse(good, name, damage)


@given(value=values)
@settings(FUZZ, max_examples=150)
def test_an_index_of_any_shape_is_read_or_refused(good: Path, value: Any) -> None:
    def whole(_: bytes) -> bytes:
        return json.dumps(value).encode("utf-8", "surrogatepass")

    def map_only(data: bytes) -> bytes:
        return json.dumps({**json.loads(data), "weight_map": value}).encode("utf-8", "surrogatepass")

    load_or_refuse(good, "model.safetensors.index.json", whole)
    load_or_refuse(good, "model.safetensors.index.json", map_only)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_nested_too_deeply_is_refused(good: Path, name: str) -> None:
    load_or_refuse(good, name, lambda _: b"[" * 100_000)
