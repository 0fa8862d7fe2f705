"""fp32 logits on a GPU equal those of transformers' own DeepSeek-V3 on the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.model_config import ModelConfig
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
MakeTokens = Callable[..., Tensor]

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def export(model: DeepseekV3, folder: Path) -> None:
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config))
    save_pretrained(named, str(folder), model.config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 33),
        ({"rope_scaling": YARN}, 150),
        ({"q_lora_rank": None, "n_group": 1}, 33),
        ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}, 33),
        ({"rope_scaling": YARN}, 1),
    ],
)
def test_fp32_logits_equal_transformers(
    changes: dict[str, Any],
    length: int,
    tmp_path: Path,
    make_config: MakeConfig,
    make_model: MakeModel,
    make_tokens: MakeTokens,
) -> None:
    transformers = pytest.importorskip("transformers")
    config = make_config(num_nextn_predict_layers=0, **changes)
    export(make_model(config), tmp_path)
    ours = load_pretrained(str(tmp_path), dtype=torch.float32, device="cuda")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).cuda().eval()
    tokens = make_tokens(config, 2, length).cuda()
    with torch.no_grad():
        difference = ours.logits(ours(tokens).hidden_BTD) - theirs(tokens, use_cache=False).logits
    assert difference.abs().max() < 1e-4
