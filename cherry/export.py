"""`python -m cherry.export`: a run's newest committed checkpoint as a Hugging Face folder.

Only weights are read, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from base import storage
from base.config import load
from base.errors import ArgumentParser, CheckpointError, MissingFileError, run_program
from cherry.checkpoint.checkpointer import read_state, reader_of
from cherry.checkpoint.digests import verify
from cherry.checkpoint.naming import newest_checkpoint
from cherry.checkpoint.resume_rules import checkpoints_of
from cherry.job_config import JobConfig, weights_folder
from cherry.lora import add_adapters, merged
from model.transformer import DeepseekV3
from model.weights.hf_names import state_to_hf
from model.weights.pretrained import save_pretrained

# fp8 is DeepSeek's release format: projections in blocks with scales, the rest in bf16.
_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}


def export(run_directory: str, *, dtype: torch.dtype, checkpoint: str | None = None) -> str:
    """URI of the checkpoint that was exported to `<run>/export`: the given one, or the newest committed one.

    Adapters are merged into the weights: the folder holds a plain model. Chat template and generation settings of the
    folder that the run started from are carried over.

    Raises:
        MissingFileError: it is no run directory, or no checkpoint is committed.
        CheckpointError: a file of the checkpoint is corrupt, or it is of another model.
    """
    path = storage.join(run_directory, "config.yaml")
    if not storage.exists(path):
        raise MissingFileError(
            f"{run_directory}: holds no config.yaml, so it is no run directory. `cherry status` lists the runs."
        )
    config = load(path, JobConfig, part_of_file=True)
    directory = checkpoints_of(config, run_directory)
    source = checkpoint or newest_checkpoint(directory)
    if source is None:
        raise MissingFileError(
            f"{directory} holds no committed checkpoint. Train first; `cherry status` shows how far it is."
        )
    verify(source, storage.read_commit(source))
    target = storage.join(run_directory, "export")
    storage.remove_tree(target)
    with torch.device("meta"):
        model = DeepseekV3(config.model)
    if config.lora is not None:
        add_adapters(model, config.lora)
    tokenizer = storage.join(run_directory, "data", "tokenizer.json")
    state = read_tensors(model, source)
    if config.lora is not None:
        state = merged(state, config.lora)
    tensors = (pair for name, tensor in state for pair in state_to_hf(name, tensor, config.model))
    origin = None if config.init_from is None else weights_folder(config.init_from)
    save_pretrained(tensors, target, config.model, dtype=dtype, tokenizer_uri=tokenizer, source_uri=origin)
    return source


def read_tensors(model: DeepseekV3, source: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each of the checkpoint's weights, read lazily: one tensor is in memory at a time.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    reader = reader_of(source)
    stored = reader.read_metadata().state_dict_metadata
    wanted = model.state_dict()
    wrong = [f"missing {name}" for name in wanted if f"model.{name}" not in stored]
    sizes = {name: tuple(getattr(stored.get(f"model.{name}"), "size", ())) for name in wanted}
    wrong += [
        f"wrong shape of {name}: {list(sizes[name])}, the config has {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if f"model.{name}" in stored and sizes[name] != tuple(tensor.shape)
    ]
    if wrong:
        raise CheckpointError(f"{source} is not of the configured model:\n" + "\n".join(f"  {line}" for line in wrong))
    for name, tensor in wanted.items():
        state = {"model": {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")}}
        read_state(state, reader, None)
        yield name, state["model"][name]


def main() -> None:
    """Entry point of `python -m cherry.export`."""
    parser = ArgumentParser(prog="python -m cherry.export", description=__doc__)
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bf16")
    parser.add_argument("--checkpoint", help="a committed checkpoint (default: the newest)")
    options = parser.parse_args()
    source = export(options.run_dir, dtype=_DTYPES[options.dtype], checkpoint=options.checkpoint)
    print(f"exported {source} to {storage.join(options.run_dir, 'export')} in {options.dtype}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
