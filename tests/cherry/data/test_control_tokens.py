"""Which tokens are control tokens, and which texts spell one or may become part of one."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, normalizers

from cherry.data.control_tokens import ControlTokens
from tests.cherry.data import templates


def test_all_added_tokens_but_white_space_are_control_tokens() -> None:
    tokenizer = templates.tokenizer()
    tokenizer.add_tokens([AddedToken("    ", special=False)])
    found = ControlTokens(tokenizer).ids
    assert {tokenizer.id_to_token(number) for number in found} == {*templates.SPECIAL, *templates.NOT_SPECIAL}


@pytest.mark.parametrize("normalized", [False, True])
def test_names_are_found_in_a_text_as_the_tokenizer_finds_them(normalized: bool) -> None:
    tokenizer = templates.tokenizer()
    if normalized:
        tokenizer.normalizer = normalizers.NFKC()
    found = ControlTokens(tokenizer)
    assert found.spelled("a <bos> </think>") == [(2, 7), (8, 16)]
    assert found.spelled("＜think＞") == ([(0, 7)] if normalized else [])


def test_a_part_of_a_name_may_join() -> None:
    found = ControlTokens(templates.tokenizer())
    assert [found.may_join(text) for text in ("start", "x<|im_", "end|>x", "x<", "xyz", "")] == [True] * 4 + [False] * 2
