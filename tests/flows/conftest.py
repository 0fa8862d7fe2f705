"""The `cherry` command called in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flows.cli import main


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.fixture
def code() -> Callable[..., object]:
    """Exit code of the command with these arguments."""
    return exit_code
