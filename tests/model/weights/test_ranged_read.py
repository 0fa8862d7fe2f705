"""Reading parts of weights: what comes out, which bytes are read for it, and the progress reported meanwhile."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor

from base import storage
from base.errors import WeightsError
from model.model_config import ModelConfig
from model.numerics.fp8_blocks import dequantize_blocks, quantize_blocks
from model.transformer import DeepseekV3
from model.weights.pretrained import Part, load_into, load_parts, save_pretrained, state_to_hf, write_index
from model.weights.ranged_read import Request, fill
from model.weights.reader import WeightsReader
from model.weights.safetensors_file import Box, open_store, write_file

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
BOXES: list[Box] = [
    ((0, 300), (0, 400)),
    ((37, 41), (0, 400)),  # inside one row of blocks
    ((100, 257), (0, 400)),  # begins and ends inside blocks
    ((128, 256), (130, 390)),
    ((299, 300), (399, 400)),
    ((5, 5), (0, 400)),
]


class CountedFileSystem(MemoryFileSystem):
    """Memory that notes which ranges of which file were read."""

    protocol = "counted"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    reads: ClassVar[list[tuple[str, int, int]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("counted://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data = super().cat_file(path, start, end, **kwargs)
        self.reads.append((path.rsplit("/", 1)[-1], start or 0, (start or 0) + len(data)))
        return data


@pytest.fixture
def counted() -> Iterator[str]:
    """URI of an empty folder whose reads are counted."""
    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    CountedFileSystem.reads.clear()
    yield f"counted://{uuid.uuid4().hex}"
    CountedFileSystem.store.clear()


def data_reads() -> list[tuple[str, int, int]]:
    """What was read since the last look, headers and folders' JSON left out."""
    found = [read for read in CountedFileSystem.reads if read[0].endswith(".safetensors")]
    CountedFileSystem.reads.clear()
    return found


def fp8_folder(uri: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write weights in fp8 with their scales in another file; what they are dequantized."""
    values, scales, exact = {}, {}, {}
    for name, weight in weights.items():
        values[name], scales[f"{name}_scale_inv"] = quantize_blocks(weight)
        exact[name] = dequantize_blocks(values[name], scales[f"{name}_scale_inv"])
    write_file(storage.join(uri, "a.safetensors"), values)
    write_file(storage.join(uri, "b.safetensors"), scales)
    write_index(uri, dict.fromkeys(values, "a.safetensors") | dict.fromkeys(scales, "b.safetensors"))
    return exact


def read(reader: WeightsReader, name: str, box: Box, **options: Any) -> Tensor:
    target = torch.full([last - first for first, last in box], torch.nan)
    fill(reader, [Request(name, box, target)], **options)
    return target


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("box", BOXES)
def test_a_part_of_an_fp8_weight_is_that_part_of_the_whole(place: str, box: Box, tmp_path: Path) -> None:
    uri = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}"
    exact = fp8_folder(uri, {"w": torch.randn(300, 400)})["w"]
    part = read(WeightsReader(uri), "w", box)
    assert torch.equal(part, exact[tuple(slice(*bounds) for bounds in box)])


def test_exactly_the_rows_that_are_needed_are_read_and_only_their_scales(counted: str) -> None:
    fp8_folder(counted, {"v": torch.randn(256, 256), "w": torch.randn(576, 512)})
    reader = WeightsReader(counted)
    reader.open_files()
    data_reads()
    read(reader, "w", ((200, 300), (0, 512)), max_gap_bytes=0)
    reads = {file: (start - reader.file(file).tensors[name].start, stop - start) for (file, start, stop), name in zip(
        sorted(data_reads()), ("w", "w_scale_inv"), strict=True
    )}  # fmt: skip
    assert reads == {"a.safetensors": (200 * 512, 100 * 512), "b.safetensors": (1 * 4 * 4, 2 * 4 * 4)}


def test_neighbours_are_read_by_one_request_and_others_side_by_side(counted: str) -> None:
    weights = {f"w{i}": torch.randn(64, 32) for i in range(8)}
    write_file(storage.join(counted, "model.safetensors"), weights)
    reader = WeightsReader(counted)
    data_reads()
    targets = {name: torch.empty(64, 32) for name in weights}
    wanted = [Request(name, ((0, 64), (0, 32)), targets[name]) for name in ("w6", "w1", "w2", "w3", "w7")]
    fill(reader, wanted, max_gap_bytes=0)
    size = 64 * 32 * 4
    assert Counter(stop - start for _, start, stop in data_reads()) == {3 * size: 1, 2 * size: 1}
    assert all(torch.equal(targets[request.name], weights[request.name]) for request in wanted)
    fill(reader, wanted, max_gap_bytes=2 * size)
    assert [stop - start for _, start, stop in data_reads()] == [7 * size], "w4 and w5 cost less than a request"


def test_ranks_together_read_the_file_once(counted: str, make_config: MakeConfig, make_model: MakeModel) -> None:
    """Eight ranks: experts over two, each half over four by another dimension; everything else over eight by rows."""
    model = make_model(make_config())
    tensors = [pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, model.config)]
    save_pretrained(tensors, counted, model.config, dtype=torch.float32, max_shard_bytes=60_000)
    reader = WeightsReader(counted)
    reader.open_files()
    seen: Counter[tuple[str, int]] = Counter()
    for rank in range(8):
        parts = [shard(name, value, rank) for name, value in model.state_dict().items()]
        data_reads()
        load_parts(parts, reader, model.config, max_gap_bytes=0)
        for part in parts:
            where = tuple(slice(*bounds) for bounds in part.box)
            assert torch.equal(part.values, model.state_dict()[part.name][where]), (rank, part.name)
        mine = sum(part.values.numel() * part.values.itemsize for part in parts)
        reads = data_reads()
        assert sum(stop - start for _, start, stop in reads) == mine, "no byte more than this rank holds"
        for file, start, stop in reads:
            seen.update((file, place) for place in range(start, stop, 4))
    assert set(seen.values()) == {1}, "nothing twice"
    state = model.state_dict()
    assert len(seen) == sum(value.numel() for value in state.values())


def shard(name: str, value: Tensor, rank: int) -> Part:
    box = [(0, size) for size in value.shape]

    def cut(dim: int, part: int, of: int) -> None:
        first, last = box[dim]
        step = -(-(last - first) // of)
        box[dim] = min(last, first + part * step), min(last, first + (part + 1) * step)

    if name.endswith(("EFD", "EDF")):
        cut(0, rank % 2, 2)
        cut(1, rank // 2, 4)
    else:
        cut(0, rank, 8)
    return Part(name, value.shape, tuple(box), torch.zeros([last - first for first, last in box], dtype=value.dtype))


def test_s3_reads_ranges(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{s3}/weights"
    exact = fp8_folder(uri, {"w": torch.randn(700, 300)})["w"]
    store = open_store(uri)
    got: list[int] = []
    plain = store.cat_file

    def counting(*args: Any, **options: Any) -> bytes:
        data: bytes = plain(*args, **options)
        got.append(len(data))
        return data

    monkeypatch.setattr(store, "cat_file", counting)  # fsspec gives the reader the same object
    reader = WeightsReader(uri)
    reader.open_files()
    got.clear()
    assert torch.equal(read(reader, "w", ((130, 400), (0, 300))), exact[130:400])
    assert sorted(got) == [3 * 3 * 4, 270 * 300]


def test_a_part_of_a_local_file_maps_its_own_pages_only(tmp_path: Path) -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("needs /proc")
    file = tmp_path / "model.safetensors"
    write_file(str(file), {"w": torch.ones(16384, 512)})  # 32 MiB
    reader = WeightsReader(str(tmp_path))
    assert read(reader, "w", ((8000, 8256), (0, 512))).eq(1).all()  # 512 KiB
    entries = re.findall(rf"{re.escape(str(file))}\n(?:.*\n)*?Rss: +(\d+) kB", smaps.read_text())
    assert entries
    assert 512 <= sum(map(int, entries)) < 16384, "the kernel maps some pages around, not all"


def test_progress_reports_bytes_rate_and_the_time_left(tmp_path: Path, make_config: MakeConfig, make_model: MakeModel):
    model = make_model(make_config())
    tensors = [pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, model.config)]
    save_pretrained(tensors, str(tmp_path), model.config, dtype=torch.bfloat16)
    reports: list[tuple[str, float]] = []
    load_into(model, str(tmp_path), on_progress=lambda line, fraction: reports.append((line, fraction)))
    assert reports[-1][1] == 1.0
    assert re.fullmatch(r"read (\S+ [KM]B) of \1 of weights, \S+ [KMG]B/s, 0 s left", reports[-1][0])


def test_damaged_files_missing_tensors_and_scales_are_reported_at_once(
    tmp_path: Path, make_config: MakeConfig, make_model: MakeModel
) -> None:
    model = make_model(make_config(hidden_size=160, moe_intermediate_size=136))
    config, uri = model.config, str(tmp_path)
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in ("a", "b", "c")}
    for name, value in model.state_dict().items():
        for hf_name, part in state_to_hf(name, value, config):
            groups["a" if ".experts." in hf_name else "b" if "layers.0" in hf_name else "c"][hf_name] = part
    down = "model.layers.2.mlp.shared_experts.down_proj.weight"
    groups["c"][down], _ = quantize_blocks(groups["c"][down])
    groups["c"].pop("model.norm.weight")
    for name, group in groups.items():
        write_file(storage.join(uri, f"{name}.safetensors"), group)
    write_index(uri, {tensor: f"{name}.safetensors" for name, group in groups.items() for tensor in group})
    (tmp_path / "a.safetensors").unlink()
    cut = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(cut[:-1])
    before = model.lm_head.weight.clone()
    with pytest.raises(WeightsError) as caught:
        load_into(model, uri)
    lines = str(caught.value).splitlines()[1:]
    for part in (
        "a.safetensors does not exist, but",
        "b.safetensors is truncated: tensor",
        "missing model.norm.weight (shape [160])",
        f"fp8 tensor {down} of shape [160, 136] needs {down}_scale_inv of shape [2, 2] (got none)",
    ):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 4
    assert torch.equal(model.lm_head.weight, before)


def test_a_file_that_was_cut_while_it_was_open_is_reported(counted: str) -> None:
    write_file(storage.join(counted, "model.safetensors"), {"w": torch.ones(64, 32)})
    reader = WeightsReader(counted)
    path = storage.join(counted, "model.safetensors")
    storage.write_bytes(path, storage.read_bytes(path)[:-100])
    with pytest.raises(WeightsError, match=r"truncated: tensor w should end at byte"):
        read(reader, "w", ((0, 64), (0, 32)))
