"""Documents that are packed into rows: the same hidden states and losses as each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cherry.data.collate import mtp_targets
from cherry.loss import IGNORE_INDEX
from cherry.training_model import TrainingModel
from model.document_mask import Documents

BOS, EOS = 0, 1


def document(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [BOS, *torch.randint(2, 97, (length - 2,), generator=generator).tolist(), EOS]


def packed() -> tuple[Tensor, list[list[list[int]]]]:
    """Two rows of 40 tokens and their documents; the second row begins and ends in the middle of one."""
    rows = [
        [document(17, 0), document(9, 1), document(14, 2)],
        [document(20, 3)[9:], document(6, 4), document(30, 5)[:23]],
    ]
    return torch.tensor([[token for part in row for token in part] for row in rows]), rows


def test_boundaries_positions_and_who_sees_whom() -> None:
    tokens_BT, rows = packed()
    documents = Documents(tokens_BT, BOS)
    lengths = [len(part) for row in rows for part in row]
    assert documents.position_BT.flatten().tolist() == [place for length in lengths for place in range(length)]
    begins = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    boundaries = documents.boundaries_S.tolist()
    assert boundaries[: len(begins)] == begins
    assert set(boundaries[len(begins) :]) == {80}
    assert len(boundaries) % 64 == 0
    owner = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths)).view(2, 1, 40)
    same = owner.transpose(1, 2) == owner
    assert torch.equal(documents.mask_B1TT[:, 0], same & torch.ones(40, 40, dtype=torch.bool).tril())


@pytest.mark.parametrize("yarn", [None, {}])
def test_hidden_states_of_a_packed_row_are_those_of_each_document_alone(make_config, make_model, yarn) -> None:
    model = make_model(make_config(rope_scaling=yarn)).train()
    tokens_BT, rows = packed()
    out = model(tokens_BT, Documents(tokens_BT, BOS))
    across = model(tokens_BT)
    for row, parts in enumerate(rows):
        first = 0
        for part in parts:
            place = slice(first, first + len(part))
            first += len(part)
            alone = model(torch.tensor([part]))
            torch.testing.assert_close(out.hidden_BTD[row, place], alone.hidden_BTD[0], rtol=1e-4, atol=1e-4)
            # The last position of a document sees the next one's first token there, and bears no loss.
            inner = slice(place.start, place.stop - 1)
            torch.testing.assert_close(
                out.mtp_hidden_BTD[row, inner], alone.mtp_hidden_BTD[0, :-1], rtol=1e-4, atol=1e-4
            )
    assert not torch.allclose(across.hidden_BTD[0, 17:], out.hidden_BTD[0, 17:], atol=1e-2)


def test_losses_and_gradients_of_packed_rows_are_the_sums_over_their_documents(make_config, make_model) -> None:
    model = make_model(make_config()).train()
    network = TrainingModel(model, 16)
    tokens_BT, rows = packed()

    def targets(tokens: Tensor) -> Tensor:
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE_INDEX)], dim=1)
        return following.masked_fill(following == BOS, IGNORE_INDEX)

    documents = Documents(tokens_BT, BOS)
    loss, mtp_loss, _ = network(tokens_BT, targets(tokens_BT), documents)
    (loss + mtp_loss).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = torch.zeros(2)
    counted = 0
    for part in (part for row in rows for part in row):
        tokens = torch.tensor([part])
        one, mtp_one, _ = network(tokens, targets(tokens))
        (one + mtp_one).backward()
        alone += torch.stack([one.detach(), mtp_one.detach()])
        counted += len(part) - 2
    torch.testing.assert_close(torch.stack([loss, mtp_loss]).detach(), alone, rtol=1e-5, atol=1e-4)
    assert int((mtp_targets(targets(tokens_BT), documents) != IGNORE_INDEX).sum()) == counted
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_document_a_row_is_plain_causal_attention(make_config, make_model, make_tokens) -> None:
    config = make_config()
    model = make_model(config).eval()
    tokens_BT = make_tokens(config, 2, 24).clamp(min=2)
    expected = model(tokens_BT).hidden_BTD
    torch.testing.assert_close(model(tokens_BT, Documents(tokens_BT, BOS)).hidden_BTD, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none")
def test_on_a_gpu_the_kernel_computes_what_the_mask_says() -> None:
    from model.document_mask import has_varlen_kernel, varlen_attention

    tokens_BT, _ = packed()
    documents = Documents(tokens_BT, BOS).to(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 3, 40, 192), (2, 3, 40, 192), (2, 3, 40, 128)]
    made = [torch.randn(shape, device="cuda", generator=generator).bfloat16().requires_grad_() for shape in shapes]
    assert has_varlen_kernel(made[0])
    out = varlen_attention(*made, 0.07, documents)
    out.float().square().sum().backward()
    ours = [tensor.grad.float() for tensor in made]
    wide = [tensor.detach().double().requires_grad_() for tensor in made]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=documents.mask_B1TT, scale=0.07)
    expected.square().sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    for gradient, tensor in zip(ours, wide, strict=True):
        torch.testing.assert_close(gradient.double(), tensor.grad, rtol=5e-2, atol=5e-2)
