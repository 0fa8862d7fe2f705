"""Report on weights that do not fit a model: a few lines of each kind, how many there are, and the likely cause."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from base.errors import WeightsError
from model.model_config import ModelConfig

# Lines of one kind that are shown: 671B misses some 800 tensors with one layer.
_SHOWN = 8
# Endings of weights in quantized formats of GPTQ, AWQ and compressed-tensors.
_PACKED = (".qweight", ".weight_packed", ".weight_zero_point")

# Tensors that a release has twice, in its MTP layer too.
_COPIES = ("embed_tokens.weight", "head.weight")
# What torch.compile adds to the names inside a compiled block.
_COMPILED = "._orig_mod."


@dataclass
class Misfit:
    """Tensors that keep weights from being loaded, in the order in which they were found."""

    missing: dict[str, Sequence[int]] = field(default_factory=dict)
    """Shape of each tensor that the model needs and the weights lack, by released name."""
    wrong: dict[str, None] = field(default_factory=dict)
    """Lines about other shapes, types or scales, and about damaged files, each once."""
    unexpected: dict[str, Sequence[int] | None] = field(default_factory=dict)
    """Shape, when it can be read, of each tensor that the model has no place for."""

    def raise_if_any(self, uri: str, names: Collection[str], config: ModelConfig) -> None:
        """Raise what was found.

        Args:
            names: of all tensors of the weights.

        Raises:
            WeightsError: names the likely cause, and the first tensors of each kind.
        """
        count = len(self.missing) + len(self.wrong) + len(self.unexpected)
        if not count:
            return
        if (prefix := self._prefix(names)) is not None:
            raise WeightsError(
                f"{uri} does not fit the model: the names of its tensors begin with {prefix!r}, as in "
                f"{prefix + next(iter(self.missing))}. Save them without it."
            )
        if (reason := self._renamed()) is not None:
            raise WeightsError(f"{uri} does not fit the model: {reason}")
        lines = [
            *_few("missing", [f"missing {name} (shape {list(shape)})" for name, shape in self.missing.items()]),
            *_few("of another shape or type, or damaged", list(self.wrong)),
            *_few("unexpected", [f"unexpected {name}{_shape(shape)}" for name, shape in self.unexpected.items()]),
        ]
        text = "\n".join(f"  {line}" for line in lines)
        raise WeightsError(f"{uri} does not fit the model: {count} problems. {self._cause(names, config)}\n{text}")

    def _prefix(self, names: Iterable[str]) -> str | None:
        """Prefix of the stored names: `module.` of DDP, `_orig_mod.` of torch.compile, a larger model's."""
        if not self.missing:
            return None
        wanted = next(iter(self.missing))
        found = next((name for name in names if name.endswith(f".{wanted}")), None)
        return None if found is None else found.removesuffix(wanted)

    def _renamed(self) -> str | None:
        """Sentences on how all unexpected names came from missing ones; `None` where they did not."""
        if not self.unexpected:
            return None
        first = next(iter(self.unexpected))
        if all(name.replace(_COMPILED, ".") in self.missing for name in self.unexpected):
            return f"names of its tensors contain `_orig_mod.` of torch.compile, as in {first}. Save them without it."
        if any(f"model.{name}" in self.missing for name in self.unexpected) and all(
            f"model.{name}" in self.missing or name.endswith(_COPIES) for name in self.unexpected
        ):
            return (
                f"the names of its tensors lack the prefix 'model.', as in {first}. Save the whole model's state dict, "
                "not that of the decoder inside it."
            )
        return None

    def _cause(self, names: Collection[str], config: ModelConfig) -> str:
        mtp = f"model.layers.{config.num_hidden_layers}."
        without_mtp = not any(name.startswith(mtp) for name in names)
        if self.missing and without_mtp and all(name.startswith(mtp) for name in self.missing):
            return "The weights have no MTP layer: set model.num_nextn_predict_layers to 0."
        if any(name.endswith(_PACKED) for name in self.unexpected):
            return "The weights are quantized in a format that cannot be loaded here. Take the plain weights."
        if self.missing and len(self.unexpected) == len(names):
            return "No tensor has a released name. Convert the weights to Hugging Face's layout."
        return "Check that model and weights belong together:"


def _few(kind: str, lines: list[str]) -> list[str]:
    rest = len(lines) - _SHOWN
    return [*lines[:_SHOWN], f"and {rest} more {kind}"] if rest > 1 else lines


def _shape(shape: Sequence[int] | None) -> str:
    return "" if shape is None else f" (shape {list(shape)})"
