"""llm-compressor's side of benchmarks/quantize_methods.py: quantizes an export by GPTQ or AWQ to W4A16 and writes it.

Run by the python of an environment that has llm-compressor, whose pins differ from this project's; so nothing of the
project is imported here, and what passes between the two are files: tokens in (safetensors), a folder and a report
(JSON) out.

    PYTHON -P benchmarks/llm_compressor.py --export DIR --tokens FILE --target DIR --report FILE --settings JSON

Its own defaults stand, but for what the settings name. Routed experts are made linear layers by its own
`linearize_moe`; attention, dense, shared and routed experts' projections are quantized, the router (`mlp.gate`)
and the head are not. The report has the held-out loss before and after, by transformers' model in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

# Sequences that run through the model together.
_BATCH = 16


def awq_mappings(config: Any) -> list[AWQMapping]:
    """llm-compressor's mappings of DeepseekV3ForCausalLM, with dense layers and mixtures named apart.

    Its own take `mlp.gate` to be in every layer, and fail where the first layers are dense.
    """
    dense = config.first_k_dense_replace
    layers = {
        kind: "|".join(map(str, numbers))
        for kind, numbers in (("dense", range(dense)), ("mixture", range(dense, config.num_hidden_layers)))
    }
    mappings = [
        AWQMapping("re:.*input_layernorm$", ["re:.*(q|q_a)_proj$", "re:.*kv_a_proj_with_mqa$"]),
        AWQMapping("re:.*q_a_layernorm$", ["re:.*q_b_proj$"]),
        AWQMapping("re:.*kv_a_layernorm$", ["re:.*kv_b_proj$"]),
    ]
    for kind, routers in (("dense", []), ("mixture", ["gate$"])):
        if layers[kind]:
            prefix = rf"re:.*layers\.({layers[kind]})\."
            readers = [rf"{prefix}mlp\.{tail}" for tail in (*routers, "(.*\\.)?gate_proj$", "(.*\\.)?up_proj$")]
            mappings.append(AWQMapping(rf"{prefix}post_attention_layernorm$", readers))
    return [*mappings, AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])]


def scheme_of(model: nn.Module, group: int) -> dict[str, Any]:
    """W4A16 for all projections. Rows narrower than a group, which its observers refuse, are a group of their own."""
    targets: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            targets.setdefault(min(group, module.in_features), []).append(name)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    groups = {
        f"group_{size}": {"targets": names, "weights": {**weights, "group_size": size}}
        for size, names in targets.items()
    }
    return {"config_groups": groups, "ignore": ["lm_head", "re:.*mlp.gate$"]}


def recipe_of(settings: dict[str, Any], model: Any) -> list[Any]:
    """Modifiers of a method: `gptq`, or `awq` with plain rounding after it, as their examples have it."""
    scheme = scheme_of(model, settings["group"])
    if settings["method"] == "gptq":
        return [GPTQModifier(**scheme)]
    if not torch.accelerator.is_available():
        # It pins what it keeps in memory, which torch refuses then; no number depends on it.
        IntermediatesCache.pin_memory = lambda *_arguments: None
    return [AWQModifier(mappings=awq_mappings(model.config)), QuantizationModifier(**scheme)]


def described(recipe: list[Any], target: Path) -> dict[str, Any]:
    """Settings that came of the defaults, for the row."""
    groups = json.loads((target / "config.json").read_text())["quantization_config"]["config_groups"].values()
    found = {key: next(iter(groups))["weights"].get(key) for key in ("observer", "actorder", "scale_dtype")}
    for modifier in recipe:
        fields = ("block_size", "dampening_frac", "duo_scaling", "n_grid")
        found |= {field: getattr(modifier, field) for field in fields if hasattr(modifier, field)}
    return found


@torch.no_grad()
def heldout_loss(model: nn.Module, tokens: dict[str, Tensor]) -> float:
    """Mean loss in nats of the scored tokens, window by window."""
    total, count = 0.0, 0
    lengths = tokens["lengths_W"].tolist()
    parts = (torch.split(tokens[name], lengths) for name in ("tokens_N", "targets_N", "scored_N"))
    for tokens_T, targets_T, scored_T in zip(*parts, strict=True):
        scored_T = scored_T.bool()
        logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0].float()
        total += F.cross_entropy(logits_TV[scored_T], targets_T[scored_T], reduction="sum").item()
        count += int(scored_T.sum())
    return total / count


def quantize(export: Path, tokens: dict[str, Tensor], target: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Report of one method, once its folder is written."""
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=getattr(torch, settings["dtype"])).eval()
    linearize_moe(model)
    report: dict[str, Any] = {"plain_loss": heldout_loss(model, tokens)}
    recipe = recipe_of(settings, model)
    documents: Any = [{"input_ids": one} for one in torch.split(tokens["calibration_ST"], _BATCH)]
    started = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=str(export),
        recipe=recipe,
        dataset=DataLoader(documents, batch_size=None),
        num_calibration_samples=len(tokens["calibration_ST"]),
        moe_calibrate_all_experts=settings["all_experts"],
    )
    report["seconds"] = time.perf_counter() - started
    report["rounded_loss"] = heldout_loss(model, tokens)
    model.save_pretrained(target)
    report["settings"] = {**settings, **described(recipe, target)}
    report["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    report["versions"] = {
        name: version(name) for name in ("llmcompressor", "transformers", "compressed-tensors", "torch")
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True, help="method, group, dtype, all_experts")
    options = parser.parse_args()
    report = quantize(options.export, load_file(options.tokens), options.target, options.settings)
    options.report.write_text(json.dumps(report, default=str))


if __name__ == "__main__":
    main()
