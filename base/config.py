"""Strict configuration: plain values validated into frozen sections, with all errors at once.

The schemas of the sections stand beside the code that they configure; base/yaml_config.py reads the values.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from base.errors import ConfigError, has_credentials
from base.yaml_config import apply_overrides, printable, read_yaml, shown

UNION_TAG = ""
"""Tag of the variants of a key that takes several types: errors name the key without it."""
_DEFER_RULES = {"defer_rules": True}
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
_TEXT_RULE = "must not hold a null character or half of a surrogate pair"
_NO_SECRETS = "a URI must not hold a password: this file is kept and shown. Set credentials in the environment"


@dataclass(frozen=True)
class Problem:
    """A broken rule: the dotted key (relative to the section), the rule, and the value that breaks it."""

    key: str
    rule: str
    value: object
    of: tuple[str, ...] = ()
    """Other keys that the rule goes by: where the value of one is wrong, it is not told."""

    def __str__(self) -> str:
        return f"{self.key}: {self.rule} (got {shown(self.value)})"


@dataclass(frozen=True)
class Matches:
    """Annotation of a string that must match a pattern: an editor gets the pattern, a person the rule in words."""

    pattern: str
    rule: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "pattern": self.pattern}

    def _checked(self, text: str) -> str:
        # As in a JSON schema: `$` is the end, and not also before a last newline.
        if re.search(self.pattern.removesuffix("$") + r"\Z" if self.pattern.endswith("$") else self.pattern, text):
            return text
        raise PydanticCustomError("no_match", "{rule}", {"rule": self.rule})


class Section(BaseModel):
    """A frozen, strict section of a configuration. Subclasses check combinations of values in `problems`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    example: ClassVar[str] = ""
    """A short one as YAML has it, for the error of a value that is no mapping."""

    def problems(self) -> Iterator[Problem]:
        """Problems with combinations of values that are each valid."""
        return iter(())

    def all_problems(self, prefix: str = "") -> Iterator[Problem]:
        """Problems of this section and of every section inside it, with keys relative to `prefix`."""
        for problem in self.problems():
            of = tuple(f"{prefix}{key}" for key in problem.of)
            yield Problem(prefix + problem.key, problem.rule, problem.value, of)
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                yield from value.all_problems(f"{prefix}{name}.")
            elif isinstance(value, tuple):
                for place, item in enumerate(value):
                    if isinstance(item, Section):
                        yield from item.all_problems(f"{prefix}{name}.{place}.")
            elif isinstance(value, str) and has_credentials(value):
                yield Problem(prefix + name, _NO_SECRETS, value)

    @model_validator(mode="after")
    def _check_rules(self, info: ValidationInfo) -> Self:
        if info.context is not _DEFER_RULES:
            found = "; ".join(map(str, self.problems()))
            if found:
                raise ValueError(found)
        return self


Schema = TypeVar("Schema", bound=Section)


def load(
    path: str | Path, schema: type[Schema], overrides: Sequence[str] = (), *, part_of_file: bool = False
) -> Schema:
    """Read `path`, apply dotted overrides, and validate against `schema`.

    Args:
        part_of_file: ignore top-level keys that `schema` does not have, for a program that reads only some
            sections of a file which was validated in full before.

    Raises:
        MissingFileError: no file at `path`.
        ConfigError: lists every broken rule with file, dotted key, rule and value.
    """
    raw = apply_overrides(read_yaml(path), overrides)
    if part_of_file:
        raw = {key: value for key, value in raw.items() if key in schema.model_fields}
    return validate(raw, schema, origin=str(path))


def validate(raw: Mapping[str, Any], schema: type[Schema], *, origin: str) -> Schema:
    """Validate a mapping of plain values against `schema`.

    Args:
        origin: the file or command line that it comes from, for an error's text.

    Raises:
        ConfigError: lists every broken rule.
    """
    try:
        # A copy: what no key can hold is taken out of it, so that the rest can be checked.
        rest = json.loads(json.dumps(raw))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: only plain YAML values are allowed: {error}") from error
    lines = []
    for location, rule, value in list(_unfit(rest)):
        lines.append(f"{printable('.'.join(map(str, location)))}: {rule} (got {shown(value)})")
        _remove(rest, location)
    try:
        config = _parse(json.dumps(rest), schema)
    except ValidationError as error:
        items = error.errors(include_url=False)
        lines += [_line(item, schema) for item in items]
        # Rules over several keys can only be checked on valid values: remove the wrong keys and check again, so that
        # all mistakes are reported at once.
        for item in items:
            _remove(rest, item["loc"])
        wrong = {_dotted([part for part in item["loc"] if isinstance(part, str)]) for item in items}
        lines += [str(problem) for problem in _broken_rules(rest, schema, "") if wrong.isdisjoint(problem.of)]
    else:
        lines += [str(problem) for problem in config.all_problems()]
        if not lines:
            return config
    count = f"{len(lines)} problem" + ("s" if len(lines) > 1 else "")
    raise ConfigError(f"{origin}: {count}\n" + "\n".join(f"  {line}" for line in lines))


def _unfit(raw: Any, location: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], str, object]]:
    """(location, rule, value) of every value in `raw` that no key takes: text that no file name, environment variable
    or encoder takes, and numbers that no array or database takes."""
    if isinstance(raw, dict | list):
        for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
            if isinstance(key, str) and _NO_TEXT.search(key):
                yield (*location, key), _TEXT_RULE, key
            else:
                yield from _unfit(value, (*location, key))
    elif isinstance(raw, str) and _NO_TEXT.search(raw):
        yield location, _TEXT_RULE, raw
    elif isinstance(raw, int) and not -(2**63) <= raw < 2**63:
        yield location, "must be a number of at most 64 bits", raw


def _dotted(location: Sequence[int | str]) -> str:
    return printable(".".join(str(part) for part in location if part != UNION_TAG))


def _parse(text: str, schema: type[Schema]) -> Schema:
    # Through JSON, so that strict mode still takes a list for a tuple.
    return schema.model_validate_json(text, context=_DEFER_RULES)


def _broken_rules(raw: Any, schema: type[Section], prefix: str) -> Iterator[Problem]:
    """Broken rules of `raw`; where a required key is missing, those of the sections in it that are complete."""
    try:
        config = _parse(json.dumps(raw), schema)
    except ValidationError:
        inner = raw if isinstance(raw, dict) else {}
        for name, field in schema.model_fields.items():
            for section in _types_in(field.annotation):
                if issubclass(section, Section) and isinstance(inner.get(name), dict):
                    yield from _broken_rules(inner[name], section, f"{prefix}{name}.")
    else:
        yield from config.all_problems(prefix)


def dump(config: Section) -> str:
    """The configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _line(item: Any, schema: type[Section]) -> str:
    key = _dotted(item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(item['loc'], schema)} (got {shown(item['input'])})"
    if item["type"] == "model_type":
        kinds = _types_at(item["loc"], schema)
        example = next((kind.example for kind in kinds if issubclass(kind, Section)), "")
        rule = f"must be a mapping, like {example}" if example else "must be a section, a mapping of keys to values"
        return f"{key}: {rule} (got {shown(item['input'])})"
    if item["type"] == "missing":
        return f"{key}: is required and not set"
    return f"{key}: {item['msg'][:1].lower()}{item['msg'][1:]} (got {shown(item['input'])})"


def _suggestion(location: Sequence[int | str], schema: type[BaseModel]) -> str:
    found = _types_at(location[:-1], schema)
    if not found:
        return ""
    known = found[0].model_fields
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f", did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"


def _types_at(location: Sequence[int | str], schema: type[BaseModel]) -> list[type[BaseModel]]:
    """Types of the section at a location; empty where it is none."""
    found = [schema]
    for part in location:
        if isinstance(part, int) or part == UNION_TAG:
            continue  # a place in a list of sections
        field = found[0].model_fields.get(part)
        found = list(_types_in(field.annotation)) if field else []
        if not found:
            break
    return found


def _types_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _types_in(inner)


def _remove(raw: Any, location: Sequence[int | str]) -> None:
    """Remove a value by the key of the innermost mapping that holds it."""
    holder, key = None, None
    for part in (part for part in location if part != UNION_TAG):
        if isinstance(raw, dict):
            holder, key = raw, part
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            break
    if holder is not None:
        holder.pop(key, None)
