"""Strict configuration: YAML and overrides, merged and validated into frozen sections, with all errors at once.

The schemas of the sections stand beside the code that they configure.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from base.errors import ConfigError, MissingFileError, has_credentials, without_credentials

PACKAGED_CONFIGS = Path(__file__).parent / "configs"
"""The configurations that come with the package: configs/ of the repository."""
_DEFER_RULES = {"defer_rules": True}
_NO_SECRETS = "a URI must not hold a password: this file is kept and shown. Set credentials in the environment"


@dataclass(frozen=True)
class Problem:
    """A broken rule: the dotted key (relative to the section), the rule, and the value that breaks it."""

    key: str
    rule: str
    value: object

    def __str__(self) -> str:
        return f"{self.key}: {self.rule} (got {_short(self.value)})"


class Section(BaseModel):
    """A frozen, strict section of a configuration. Subclasses check combinations of values in `problems`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def problems(self) -> Iterator[Problem]:
        """Problems with combinations of values that are each valid."""
        return iter(())

    def all_problems(self, prefix: str = "") -> Iterator[Problem]:
        """Problems of this section and of every section inside it, with keys relative to `prefix`."""
        for problem in self.problems():
            yield Problem(prefix + problem.key, problem.rule, problem.value)
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                yield from value.all_problems(f"{prefix}{name}.")
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


class _Loader(yaml.SafeLoader):
    """safe_load, with YAML 1.2 floats (`1e-5` is a number) and with repeated keys refused."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)
# Integers match the pattern above too, and resolvers are tried in order: put the integer's first.
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    _resolvers.sort(key=lambda item: item[0] != "tag:yaml.org,2002:int")


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[object, object]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem="a key must be a plain value", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse one YAML document safely.

    Raises:
        ConfigError: `text` is not YAML, or repeats a key; the message names `origin` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error


def packaged_config(path: str | Path) -> Path | None:
    """The packaged file that a relative path or a bare name stands for; `None` where the user's own file is there.

    `configs/tiny.yaml` and `tiny` name configs/tiny.yaml of this package, `h100-256` a file of its configs/clusters/.
    """
    if Path(path).is_absolute() or Path(path).is_file():
        return None
    name = str(path).removeprefix("./").removeprefix("configs/")
    if ".." in Path(name).parts:
        return None
    candidates = [PACKAGED_CONFIGS / file for file in (name, f"{name}.yaml", f"clusters/{name}.yaml")]
    return next((file for file in candidates if file.is_file()), None)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, the user's own or the packaged one of that name (see `packaged_config`).

    Raises:
        MissingFileError: no file at `path`.
        ConfigError: not YAML, or not a mapping.
    """
    try:
        text = (packaged_config(path) or Path(path)).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        names = sorted(str(file.relative_to(PACKAGED_CONFIGS)) for file in PACKAGED_CONFIGS.rglob("*.yaml"))
        raise MissingFileError(
            f"no config file at {path}. Give the path of a YAML file or the name of a packaged one: {', '.join(names)}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: must be UTF-8 text, got {error}") from error
    raw = parse_yaml(text, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections, got {type(raw).__name__}")
    return raw


def merge(raw: Mapping[str, Any], changes: Mapping[str, Any], *, origin: str, prefix: str = "") -> dict[str, Any]:
    """A copy of `raw` with `changes` laid over it: sections are merged key by key, any other value is replaced.

    Args:
        origin: where the mistake is, for an error's text.
        prefix: dotted key of `raw` itself, with a dot at the end.

    Raises:
        ConfigError: `changes` has a section where `raw` has a value.
    """
    result = copy.deepcopy(dict(raw))
    for key, value in changes.items():
        if not isinstance(value, Mapping):
            result[key] = copy.deepcopy(value)
            continue
        old = result.get(key)
        if old is not None and not isinstance(old, Mapping):
            raise ConfigError(f"{origin}: {prefix}{key} must be a section to set its keys (got {_short(old)})")
        result[key] = merge(old or {}, value, origin=origin, prefix=f"{prefix}{key}.")
    return result


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with each `dotted.key=value` merged into it in turn; the value is read as YAML.

    Lists and mappings are written in brackets: `tracking.uri=json:` is a string, not a mapping with the key `json`.

    Raises:
        ConfigError: an override is not `key=value`, or its path runs through something that is not a section.
    """
    result = dict(raw)
    wrong: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            wrong.append(f"override {override!r}: must read dotted.key=value, like train.learning_rate=2e-6")
            continue
        changes = parse_yaml(text, f"override {key}")
        if isinstance(changes, list | dict) and not text.lstrip().startswith(("[", "{")):
            changes = text.strip()
        for name in reversed(path):
            changes = {name: changes}
        try:
            result = merge(result, changes, origin=f"override {override!r}")
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return result


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
        text = json.dumps(raw)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: only plain YAML values are allowed: {error}") from error
    try:
        config = _parse(text, schema)
    except ValidationError as error:
        items = error.errors(include_url=False)
        lines = [_line(item, schema) for item in items]
        # Rules over several keys can only be checked on valid values: remove the wrong keys and check again, so that
        # all mistakes are reported at once.
        rest = json.loads(text)
        for item in items:
            _remove(rest, item["loc"])
        lines += map(str, _broken_rules(rest, schema, ""))
    else:
        lines = [str(problem) for problem in config.all_problems()]
        if not lines:
            return config
    count = f"{len(lines)} problem" + ("s" if len(lines) > 1 else "")
    raise ConfigError(f"{origin}: {count}\n" + "\n".join(f"  {line}" for line in lines))


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
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(item['loc'], schema)} (got {_short(item['input'])})"
    if item["type"] == "missing":
        return f"{key}: is required and not set"
    return f"{key}: {item['msg'][:1].lower()}{item['msg'][1:]} (got {_short(item['input'])})"


def _short(value: object) -> str:
    text = without_credentials(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _suggestion(location: Sequence[int | str], schema: type[BaseModel]) -> str:
    known = schema
    for part in location[:-1]:
        field = known.model_fields.get(str(part))
        nested = list(_types_in(field.annotation)) if field else []
        if not nested:
            return ""
        known = nested[0]
    close = difflib.get_close_matches(str(location[-1]), known.model_fields, n=1)
    return f", did you mean {close[0]}?" if close else f"; known keys: {', '.join(known.model_fields)}"


def _types_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _types_in(inner)


def _remove(raw: Any, location: Sequence[int | str]) -> None:
    for part in location[:-1]:
        if isinstance(raw, dict) and part in raw:
            raw = raw[part]
        else:
            return
    if isinstance(raw, dict):
        raw.pop(location[-1], None)
