import pytest
import torch

from base.errors import WeightsError
from model.calibration.layer import Layer, load_block, read_expert
from model.moe import MoE
from model.weights.pretrained import load_pretrained
from model.weights.reader import WeightsReader
from tests.model.conftest import small_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_block_and_its_experts_are_those_of_the_model(bf16_folder, number):
    config = small_config()
    model = load_pretrained(bf16_folder, dtype=torch.float32)
    layer, reader = Layer(number, config), WeightsReader(bf16_folder)
    block = load_block(reader, layer, torch.float32, CPU)
    whole = model.mtp.block if layer.is_mtp else model.layers[number]
    expected = {name: value for name, value in whole.state_dict().items() if ".experts." not in name}
    found = block.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert layer.is_moe == isinstance(whole.mlp, MoE)
    if layer.is_moe:
        gate_up_XD, down_DF = read_expert(reader, layer, 5, torch.float32, CPU)
        assert torch.equal(gate_up_XD, whole.mlp.experts.w13_EFD[5])
        assert torch.equal(down_DF, whole.mlp.experts.w2_EDF[5])


def test_what_is_missing_is_named(bf16_folder):
    class Lacking(WeightsReader):
        @property
        def names(self):
            return [name for name in super().names if "q_b_proj" not in name]

        def __contains__(self, name):
            return name in self.names

    with pytest.raises(WeightsError, match=r"model\.layers\.1\.self_attn\.q_b_proj\.weight"):
        load_block(Lacking(bf16_folder), Layer(1, small_config()), torch.float32, CPU)
