"""Configuration as it is written: numbers and text as YAML 1.2 reads them, overrides laid over a file's values."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from base.errors import ConfigError
from base.yaml_config import apply_overrides, merge, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2E6", 2e6),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("300", 300),
        ("-7", -7),
        ("0x10", 16),
        ("1e-5x", "1e-5x"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'1e-5'", "1e-5"),
        ("null", None),
        ("true", True),
    ],
)
def test_numbers_are_read_as_yaml_1_2_reads_them(text: str, value: object) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides_are_read_as_yaml_and_leave_the_source_alone() -> None:
    raw = {"name": "a", "inner": {"size": 4}}
    result = apply_overrides(
        raw, ["inner.size=8", "inner.rates=[0.25, 1e-3]", "spare.label=x=y", "rate=1e-5", "name='7'", "inner.label="]
    )
    assert result == {
        "name": "7",
        "rate": 1e-5,
        "inner": {"size": 8, "rates": [0.25, 1e-3], "label": None},
        "spare": {"label": "x=y"},
    }
    assert raw == {"name": "a", "inner": {"size": 4}}


def test_an_override_s_collections_are_in_brackets_and_a_colon_or_dash_is_text() -> None:
    overrides = ["uri=json:", "path=json: a", "item=- x", "list=[1]", "section={a: [2]}"]
    assert apply_overrides({}, overrides) == {
        "uri": "json:",
        "path": "json: a",
        "item": "- x",
        "list": [1],
        "section": {"a": [2]},
    }


def test_bad_overrides_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"name": "a"}, ["inner.size", "=3", "inner..size=3", "name.first=b", "rate=1"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "override 'inner.size'",
        "override '=3'",
        "override 'inner..size=3'",
        "override 'name.first=b'",
    ]
    with pytest.raises(ConfigError, match=r"override rate.*not valid YAML"):
        apply_overrides({}, ["rate=[1,"])


def test_sections_are_merged_key_by_key_and_values_are_replaced() -> None:
    raw = {"a": {"b": {"c": 1, "d": [1, 2]}, "e": None}, "f": 2}
    changes = {"a": {"b": {"d": [3]}, "e": {"g": 4}}, "f": None, "h": {}}
    merged = merge(raw, changes, origin="here")
    assert merged == {"a": {"b": {"c": 1, "d": [3]}, "e": {"g": 4}}, "f": None, "h": {}}
    merged["a"]["b"]["d"].append(9)
    assert changes == {"a": {"b": {"d": [3]}, "e": {"g": 4}}, "f": None, "h": {}}
    assert merge(raw, {}, origin="here") == raw
    with pytest.raises(ConfigError, match=r"here: a\.b\.c must be a section .*got 1"):
        merge(raw, {"a": {"b": {"c": {"x": 1}}}}, origin="here")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("source=/d/corpus #2", "/d/corpus #2"),
        ("source=#2", "#2"),
        ("source='/d/corpus #2'", "/d/corpus #2"),
        ("source=a: b #c", "a: b #c"),
        ("source=/d/a::b", "/d/a::b"),
        ("source=", None),
        ("source=3", 3),
    ],
)
def test_no_part_of_an_override_is_lost_as_a_comment(override: str, value: object) -> None:
    assert apply_overrides({}, [override]) == {"source": value}


def test_what_follows_a_list_in_an_override_is_refused() -> None:
    with pytest.raises(ConfigError, match="override steps: '#x' would be read as a comment and lost"):
        apply_overrides({}, ["steps=[1, 2] #x"])


@pytest.mark.parametrize("text", ["010", "09", "1:30", "1:30.5", "0b11", "2026-11-28", "2026-11-28 10:00:00"])
def test_numbers_and_dates_that_only_yaml_1_1_knows_are_text(text: str) -> None:
    assert parse_yaml(f"key: {text}", "x") == {"key": text}


@pytest.mark.parametrize(
    ("text", "value"), [("10", 10), ("-3", -3), ("1_000", 1000), ("0x10", 16), ("0", 0), ("1e-5", 1e-5), (".5", 0.5)]
)
def test_numbers_of_yaml_1_2_are_numbers(text: str, value: object) -> None:
    found = parse_yaml(text, "x")
    assert (found, type(found)) == (value, type(value))


BOMB = (
    "a: &a ["
    + ", ".join("x" * 20)
    + "]\n"
    + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 20)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True))
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, r"line 4: .*more than 100000 values"),
        ("a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(120)), r"line \d+: .*100 levels"),
        ("a: 1\nb: &b [*b]\n", "line 2: .*must not hold an alias of itself"),
        ("a: 1\nb: " + "[" * 10_000, "line 2: .*nested more than 100 deep"),
        ("a: 1\nb: !!int x\n", "line 2: .*'x' cannot be read as YAML's type int"),
        ("a: 1\nb: " + "9" * 5000, "line 2: .*cannot be read as YAML's type int"),
        ("a: 1\nb: \0\n", "line 2: .*the character"),
    ],
)
def test_values_without_bounds_or_of_another_type_are_refused_with_their_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_yaml(text, "here")


def test_an_alias_and_a_merge_within_bounds_are_read() -> None:
    assert parse_yaml("a: &a {b: [1]}\nc: [*a, *a]\nd: {<<: *a, e: 2}\n", "here")["d"] == {"b": [1], "e": 2}


def test_a_pipe_is_read_to_its_end_and_what_has_none_is_refused(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a: 1\n")
    os.close(writer)
    assert read_yaml(f"/dev/fd/{reader}") == {"a": 1}
    os.close(reader)
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    for name, said in (("fifo", "nobody writes to"), ("socket", "device or a socket"), ("large", "at most 1,048,576")):
        with pytest.raises(ConfigError, match=f"{name}: .*{said}"):
            read_yaml(tmp_path / name)
    with pytest.raises(ConfigError, match="device"):
        read_yaml("/dev/zero")
