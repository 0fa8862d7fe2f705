"""Strict configuration: every mistake reported at once, with its place, and what is valid kept as it was given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import Field, PositiveInt, ValidationError

from base.config import Problem, Section, dump, load
from base.errors import ConfigError, MissingFileError
from base.yaml_config import read_yaml

ROOT = Path(__file__).parents[2]


class Inner(Section):
    size: PositiveInt = 4
    parts: PositiveInt = 2
    rates: tuple[float, ...] = (0.5,)
    label: str | None = None

    def problems(self) -> Iterator[Problem]:
        if self.size % self.parts:
            yield Problem("size", f"must be divisible by parts ({self.parts})", self.size)


class Outer(Section):
    name: str
    rate: float = Field(default=1.0, gt=0.0)
    inner: Inner = Inner()
    spare: Inner | None = None


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_mistakes_of_every_kind_are_reported_at_once_with_their_place(tmp_path: Path) -> None:
    path = write(tmp_path, "rate: fast\ninner: {size: 5, parts: 2, sise: 7}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, Outer)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{path}: 4 problems"
    assert sorted(line.strip() for line in rest) == [
        "inner.sise: unknown key, did you mean size? (got 7)",
        "inner.size: must be divisible by parts (2) (got 5)",
        "name: is required and not set",
        "rate: input should be a valid number (got 'fast')",
    ]


def test_a_password_in_any_uri_is_refused_and_not_repeated(tmp_path: Path) -> None:
    secret = "http://me:hunter2@mlflow:5000"
    path = write(tmp_path, f"name: {secret}\nrate: ['{secret}']\ninner: {{label: {secret}, lable: {secret}}}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, Outer)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    for key in ("name", "inner.label"):
        rule = "a URI must not hold a password: this file is kept and shown. Set credentials in the environment"
        assert f"{key}: {rule} (got 'http://***@mlflow:5000')" in lines
    assert len(lines) == 5
    assert "hunter2" not in str(caught.value)


def test_an_unlike_key_gets_the_list_of_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zzz: unknown key; known keys: name, rate, inner, spare \(got 1\)"):
        load(write(tmp_path, "name: a\nzzz: 1\n"), Outer)


def test_an_unknown_key_inside_an_optional_section_is_compared_with_that_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"spare\.lable: unknown key, did you mean label\?"):
        load(write(tmp_path, "name: a\nspare: {lable: x}\n"), Outer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: 3", r"name: .*valid string \(got 3\)"),
        ("name: a\nrate: '1.0'", r"rate: .*valid number \(got '1.0'\)"),
        ("name: a\ninner: {size: 2.5}", r"inner\.size: .*integer"),
        ("name: a\ninner: {size: yes}", r"inner\.size: .*integer \(got True\)"),
        ("name: a\nrate: .nan", r"rate: .*finite number"),
        ("name: a\nrate: .inf", r"rate: .*finite number"),
        ("name: a\nrate: -1", r"rate: .*greater than 0 \(got -1\)"),
        ("name: a\ninner: 3", r"inner: must be a section, a mapping .*got 3"),
    ],
)
def test_no_value_is_bent_into_another_type(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text), Outer)


def test_a_rule_over_two_keys_is_also_found_beside_a_wrong_key_in_another_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, "name: a\ninner: {size: 5}\nspare: {size: 0}\n"), Outer)
    assert "2 problems" in str(caught.value)
    assert "inner.size: must be divisible" in str(caught.value)
    assert "spare.size: input should be greater than 0" in str(caught.value)


def test_rules_hold_for_sections_built_in_code_too() -> None:
    with pytest.raises(ValidationError, match=r"size: must be divisible by parts \(2\) \(got 5\)"):
        Inner(size=5)


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner:\n  size: 2\n  parts: 1\n  size: 4\n")
    with pytest.raises(ConfigError) as caught:
        load(path, Outer)
    assert str(caught.value) == f"{path} line 5: not valid YAML: the key 'size' is given twice"


def test_text_that_is_not_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml line 3: not valid YAML"):
        load(write(tmp_path, "name: a\nrate: [1,\n"), Outer)
    with pytest.raises(ConfigError, match="the top level must be a mapping of sections, got list"):
        load(write(tmp_path, "- name\n"), Outer)


def test_a_file_that_holds_no_plain_text_or_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2: not valid YAML: a key must be a plain value"):
        load(write(tmp_path, "name: a\n? [1, 2]\n: 3\n"), Outer)
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: must be UTF-8 text"):
        load(path, Outer)


def test_anchors_and_merges_work_and_a_key_of_its_own_wins(tmp_path: Path) -> None:
    config = load(write(tmp_path, "name: a\ninner: &i {size: 6, parts: 3}\nspare: {<<: *i, parts: 2}\n"), Outer)
    assert config.inner == Inner(size=6, parts=3)
    assert config.spare == Inner(size=6, parts=2)


def test_yaml_tags_construct_no_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(write(tmp_path, "name: !!python/object/apply:os.getcwd []\n"), Outer)


def test_bytes_are_no_configuration_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only plain YAML values"):
        load(write(tmp_path, "name: !!binary aGk=\n"), Outer)


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no config file at .*none\.yaml"):
        load(tmp_path / "none.yaml", Outer)
    with pytest.raises(MissingFileError):
        read_yaml(tmp_path)
    assert read_yaml(write(tmp_path, "# nothing yet\n")) == {}


def test_an_override_may_open_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    config = load(write(tmp_path, "name: a\ninner:\n"), Outer, ["inner.size=6"])
    assert config.inner.size == 6


def test_overrides_apply_before_the_rules_and_a_later_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner: {size: 5}\n")
    assert load(path, Outer, ["inner.parts=3", "inner.parts=5"]).inner.parts == 5


def test_what_is_dumped_loads_back_equal(tmp_path: Path) -> None:
    config = Outer(name="café: {x}", rate=1e-5, inner=Inner(size=9, parts=3, rates=(0.1, 1e22)), spare=Inner(label=""))
    assert load(write(tmp_path, dump(config)), Outer) == config


def test_a_program_can_read_its_part_of_a_larger_file(tmp_path: Path) -> None:
    path = write(tmp_path, "size: 6\nserver: {port: 1}\n")
    assert load(path, Inner, part_of_file=True).size == 6
    with pytest.raises(ConfigError, match="server: unknown key"):
        load(path, Inner)


def test_a_configuration_cannot_be_changed() -> None:
    config = Outer(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "b"
