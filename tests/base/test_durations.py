"""Durations: each unit, what is no duration, and a text that is read back."""

import pytest

from base.config import Section, dump, validate
from base.durations import Duration, duration_s, duration_text
from base.errors import ConfigError


class Waits(Section):
    wait: Duration = 1.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("90min", 5400), ("1.5h", 5400), ("12 h", 43_200), ("30d", 30 * 86_400)]
)
def test_every_unit_is_read_and_a_spec_that_was_written_out_is_the_same(text, seconds):
    assert duration_s(text) == seconds
    read = validate({"wait": text}, Waits, origin="x.yaml")
    assert read.wait == seconds
    assert f"wait: {float(seconds)}" in dump(read)
    assert validate({"wait": float(seconds)}, Waits, origin="x.yaml") == read


@pytest.mark.parametrize(
    "wrong",
    [
        "12",
        "12m",
        "12H",
        "0h",
        "-1h",
        "h",
        "1e3s",
        "1h\n",
        0,
        -5,
        True,
        "99999d",
        1e30,
        "9" * 5000 + "s",
        "9" * 400 + "d",
    ],
)
def test_what_is_no_duration_is_refused_with_the_units(wrong):
    with pytest.raises(ConfigError, match=r"wait: must be a number above 0 .*12h.*3650d.* s, min, h, d") as caught:
        validate({"wait": wrong}, Waits, origin="x.yaml")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59, "59s"), (90, "1.5min"), (43_200, "12h"), (86_400, "1d"), (-7200, "-2h")]
)
def test_a_duration_is_told_in_the_unit_that_reads_best(seconds, text):
    assert duration_text(seconds) == text
