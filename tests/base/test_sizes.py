"""Sizes: decimal and binary units are told apart, and what is no whole number of bytes is refused in words."""

import itertools

import pytest

from base.config import Section, validate
from base.errors import ConfigError
from base.sizes import UNITS, Size, size_bytes


class Buffers(Section):
    buffer: Size = 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("256MB", 256_000_000),
        ("256MiB", 268_435_456),
        ("1.5GiB", 3 << 29),
        ("12 TB", 12 * 10**12),
        ("7B", 7),
        ("2PiB", 2 << 50),
    ],
)
def test_decimal_units_are_powers_of_1000_and_binary_ones_of_1024(text, expected):
    assert size_bytes(text) == expected
    assert validate({"buffer": text}, Buffers, origin="x.yaml").buffer == expected


def test_every_unit_is_1000_or_1024_of_the_one_before():
    for names, base in (("B KB MB GB TB PB", 1000), ("KiB MiB GiB TiB PiB", 1024)):
        assert {UNITS[after] // UNITS[before] for before, after in itertools.pairwise(names.split())} == {base}
    assert UNITS["KiB"] == 1024


@pytest.mark.parametrize(
    "wrong", ["256mb", "256M", "0MB", "-1MB", "1.5B", "MB", "1e3MB", "256MB\n", 0, -5, 1.5, True, "9" * 5000 + "MB"]
)
def test_what_is_no_size_is_refused_with_the_units(wrong):
    with pytest.raises(ConfigError, match=r"buffer: must be a whole number of bytes above 0, or .*256MB .*TiB"):
        validate({"buffer": wrong}, Buffers, origin="x.yaml")
