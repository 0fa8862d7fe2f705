"""Model runner: steps over the paged cache against a forward pass of the whole sequence, and the sampling of a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anything.engine.model_runner import ModelRunner, NonFiniteError, Sampling, absorbed_attention, sample
from anything.engine.scheduler import ScheduledChunk, Sequence
from anything.protocol import SamplingParams
from model.rope import rotary_tables
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained

BLOCK_TOKENS = 4


@pytest.fixture(scope="module")
def model(model_folder: str) -> DeepseekV3:
    return load_pretrained(model_folder, dtype=torch.float32)


def tokens_of(seed: int, length: int) -> list[int]:
    return torch.randint(2, 288, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def chunk(tokens: list[int], blocks: list[int], first: int, last: int, *, samples: bool = True) -> ScheduledChunk:
    """The step's tokens [first, last) of a sequence whose cache is in `blocks`."""
    sequence = Sequence(order=0, prompt=tokens, max_new_tokens=1)
    return ScheduledChunk(sequence, first, tuple(tokens[first:last]), tuple(blocks), samples)


def whole_logits(model: DeepseekV3, tokens: list[int]) -> torch.Tensor:
    """Logits of the last position, without a cache."""
    with torch.inference_mode():
        return model.logits(model(torch.tensor([tokens])).hidden_BTD[0, -1])


def test_chunks_and_decode_steps_give_the_logits_of_the_whole_sequence(model: DeepseekV3) -> None:
    """Two sequences whose blocks lie apart and in any order: one prefilled in chunks, one decoding beside it."""
    runner = ModelRunner(model, blocks=12, block_tokens=BLOCK_TOKENS)
    long, short = tokens_of(0, 19), tokens_of(1, 9)
    long_blocks, short_blocks = [7, 2, 11, 0, 5], [3, 9, 1]
    assert runner.step([chunk(long, long_blocks, 0, 6, samples=False)]).sampled == []
    output = runner.step([chunk(long, long_blocks, 6, 13, samples=False), chunk(short, short_blocks, 0, 7)])
    assert output.sampled == [1]
    torch.testing.assert_close(output.logits_NY[0], whole_logits(model, short[:7]), rtol=1e-4, atol=1e-4)
    # The decoding sequence comes second and is computed first; the indices say which logits are whose.
    output = runner.step([chunk(long, long_blocks, 13, 19), chunk(short, short_blocks, 7, 8)])
    assert sorted(output.sampled) == [0, 1]
    for index, got_Y in zip(output.sampled, output.logits_NY, strict=True):
        expected = whole_logits(model, [long, short[:8]][index])
        torch.testing.assert_close(got_Y, expected, rtol=1e-4, atol=1e-4)
    output = runner.step([chunk(short, short_blocks, 8, 9)])
    assert output.broken == []
    torch.testing.assert_close(output.logits_NY[0], whole_logits(model, short), rtol=1e-4, atol=1e-4)


def test_blocks_of_others_are_neither_read_nor_written(model: DeepseekV3) -> None:
    runner = ModelRunner(model, blocks=6, block_tokens=BLOCK_TOKENS)
    runner.cache_LZX.fill_(float("nan"))
    tokens, blocks = tokens_of(2, 7), [4, 1]
    runner.step([chunk(tokens, blocks, 0, 6, samples=False)])
    written = {4 * BLOCK_TOKENS + offset for offset in range(4)} | {BLOCK_TOKENS, BLOCK_TOKENS + 1}
    kept = ~runner.cache_LZX.isnan().any(-1).any(0)
    assert set(kept.nonzero().flatten().tolist()) == written


def test_absorbed_attention_is_attention_over_the_same_latents(model: DeepseekV3) -> None:
    torch.manual_seed(0)
    attention = model.layers[0].self_attn
    x_BTD = torch.randn(3, 9, model.config.hidden_size)
    tables = rotary_tables(model.config, torch.arange(9))
    with torch.inference_mode():
        queries, latents = attention.queries(x_BTD, tables), attention.latents(x_BTD, tables)
        lengths_B = torch.tensor([9, 4, 1])
        rows = torch.arange(3)
        last = (queries[0][rows, lengths_B - 1], queries[1][rows, lengths_B - 1])
        mask_B1S = (torch.arange(9) < lengths_B[:, None])[:, None]
        got_BD = absorbed_attention(attention, last, torch.cat(latents, dim=-1), mask_B1S)
        expected_BTD = attention.attend(queries, latents)
    torch.testing.assert_close(got_BD, expected_BTD[rows, lengths_B - 1], rtol=1e-4, atol=1e-5)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_row_is_sampled_by_its_own_generator_alone() -> None:
    logits_NY = torch.randn(4, 50, generator=generator(9))
    alone = sample(logits_NY[2:3], [Sampling(1.3, generator(5))])
    others = [Sampling(0.7, generator(1)), Sampling(0.0), Sampling(1.3, generator(5)), Sampling(2.0, generator(2))]
    together = sample(logits_NY, others)
    assert together[2] == alone[0]
    assert together[1] == int(logits_NY[1].argmax())


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    logits_NY = torch.tensor([[0.0, 1.0, 2.0]])
    draws, random = 4000, generator(0)
    counts = torch.zeros(3)
    for _ in range(draws):
        counts[sample(logits_NY, [Sampling(0.5, random)])[0]] += 1
    share = (logits_NY[0] / 0.5).softmax(-1)
    # Four standard deviations of a binomial share.
    assert ((counts / draws - share).abs() < 4 * (share * (1 - share) / draws).sqrt()).all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-60, 1e-46, 1e-45, 1e-30, 1e-6, 0.0])
def test_the_smallest_temperature_is_greedy_also_for_large_logits(temperature: float) -> None:
    logits_NY = torch.tensor([[1e4, 3e4, -1e4]])
    assert sample(logits_NY, [Sampling(temperature, generator(0))]) == [1]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    st.floats(0.0, 2.0),
)
def test_finite_logits_give_a_token_at_every_temperature_the_protocol_allows(row: list[float], value: float) -> None:
    temperature = SamplingParams(temperature=value).temperature
    (token,) = sample(torch.tensor([row]), [Sampling(temperature, generator(0))])
    assert isinstance(token, int)
    assert 0 <= token < len(row)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_finite_logits_fails_alone(number: float) -> None:
    logits_NY = torch.randn(4, 9, generator=generator(1))
    samplings = [Sampling(0.0), Sampling(1.0, generator(2)), Sampling(0.0), Sampling(1.0, generator(3))]
    expected = sample(logits_NY[2:], [Sampling(0.0), Sampling(1.0, generator(3))])
    logits_NY[0, 4] = logits_NY[1, 4] = number
    tokens = sample(logits_NY, samplings)
    assert [type(token) for token in tokens[:2]] == [NonFiniteError] * 2
    assert tokens[2:] == expected


def test_an_exception_of_one_rows_sampling_is_that_rows() -> None:
    logits_NY = torch.randn(2, 9, generator=generator(1))
    broken, token = sample(logits_NY, [Sampling(1.0, "no generator"), Sampling(0.0)])  # type: ignore[arg-type]
    assert isinstance(broken, Exception)
    assert token == int(logits_NY[1].argmax())


def test_a_token_without_finite_numbers_breaks_its_chunk_and_leaves_the_cache_finite(model_folder: str) -> None:
    """Beside a sequence that decodes and one that prefills, and then in a block that both padding and others read."""
    model = load_pretrained(model_folder, dtype=torch.float32)
    poison = 77
    model.embed_tokens.weight.data[poison] = float("nan")
    runner = ModelRunner(model, blocks=12, block_tokens=BLOCK_TOKENS)
    clean = [token for token in tokens_of(4, 40) if token != poison]
    first, second, bad = clean[:6], clean[6:13], [*clean[13:16], poison, *clean[16:18]]
    runner.step([chunk(first, [3, 4], 0, 5, samples=False)])
    output = runner.step(
        [chunk(first, [3, 4], 5, 6), chunk(bad, [0, 1], 0, 6, samples=False), chunk(second, [5, 6], 0, 7)]
    )
    assert (sorted(output.sampled), output.broken) == ([0, 2], [1])
    for index, got_Y in zip(output.sampled, output.logits_NY, strict=True):
        expected = whole_logits(model, first if index == 0 else second)
        torch.testing.assert_close(got_Y, expected, rtol=1e-4, atol=1e-4)
    assert runner.cache_LZX.isfinite().all()
    # One short and one long sequence: the short one's padding lies in block 0.
    more = clean[18:20]
    runner.step([chunk([*second, *more], [5, 6, 7], 7, 8, samples=False), chunk(more, [0], 0, 1, samples=False)])
    output = runner.step([chunk([*second, *more], [5, 6, 7], 8, 9), chunk(more, [0], 1, 2)])
    for index, got_Y in zip(output.sampled, output.logits_NY, strict=True):
        expected = whole_logits(model, [*second, *more] if index == 0 else more)
        torch.testing.assert_close(got_Y, expected, rtol=1e-4, atol=1e-4)


def test_a_reset_empties_the_cache_and_proves_that_the_model_runs(model: DeepseekV3) -> None:
    runner = ModelRunner(model, blocks=4, block_tokens=BLOCK_TOKENS)
    runner.cache_LZX = torch.zeros(0, 0, 0)
    with pytest.raises((IndexError, RuntimeError)):
        runner.step([chunk(tokens_of(1, 3), [2], 0, 3)])
    runner.reset()
    output = runner.step([chunk(tokens_of(1, 3), [2], 0, 3)])
    torch.testing.assert_close(output.logits_NY[0], whole_logits(model, tokens_of(1, 3)), rtol=1e-4, atol=1e-4)
