"""One block alone; blocks in a row are beside the whole model in test_runner.py."""

import pytest
import torch

from model.calibration.block import BlockCalibration, BlockRows, Settings
from model.calibration.expert_rows import ExpertCoverage
from model.calibration.int4_weight import Int4Weight
from model.calibration.layer import Layer
from model.calibration.method import Method
from model.calibration.token_rows import batches_of
from model.rope import rotary_tables
from model.weights.pretrained import load_pretrained
from model.weights.reader import WeightsReader
from tests.model.conftest import small_config


@pytest.mark.parametrize("method", [Method(group=16), Method(group=16, awq=True)], ids=["gptq", "awq"])
@pytest.mark.parametrize("number", [0, 1])
@torch.no_grad()
def test_where_nothing_is_rounded_the_rows_are_the_plain_block_s(bf16_folder, number, method):
    config = small_config()
    generator = torch.Generator().manual_seed(0)
    documents_BTD = torch.randn(4, 9, 48, generator=generator)
    rows = BlockRows(documents_BTD.flatten(0, 1), torch.empty(36, 48), torch.empty(36, 48))
    kept = []
    settings = Settings(method, lambda _: False, torch.float32, torch.device("cpu"))
    batches = list(batches_of(list(torch.zeros(4, 9))))
    block = BlockCalibration(WeightsReader(bf16_folder), Layer(number, config), rows, batches, settings)
    coverage = block.run(lambda name, result: kept.append(result))
    plain = load_pretrained(bf16_folder, dtype=torch.float32).layers[number]
    expected = plain(documents_BTD, rotary_tables(config, torch.arange(9))).hidden_BTD
    torch.testing.assert_close(rows.after_ND, expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(result, Int4Weight) for result in kept)
    assert all(isinstance(one, ExpertCoverage) for one in coverage)
    assert len(coverage) == (8 if number else 0)
