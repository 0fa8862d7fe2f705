"""Configuration as it is written: YAML files, packaged ones among them, and dotted overrides, merged into plain values.

What the values must be is the schemas' matter; see base/config.py.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import stat
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from base.errors import ConfigError, MissingFileError, without_credentials

PACKAGED_CONFIGS = Path(__file__).parent / "configs"
"""The configurations that come with the package: configs/ of the repository."""


_MAX_DEPTH = 100
"""Largest depth of nested values, far above that of any configuration; Python's own limit has no line to name."""
_MAX_BYTES = 1 << 20
"""Largest size of a config file: the wrong file, like weights, is refused before it is read to its end."""
_MAX_VALUES = 100_000
"""Largest number of values with each alias written out: a few lines of aliases can stand for more than memory holds."""


class ConfigKind(NamedTuple):
    """A kind of config file."""

    name: str
    folder: str
    """Below the packaged configs."""
    besides: str
    """What may stand in place of a file, for a sentence."""
    foreign: tuple[str, ...] = ()
    """Keys by which a file of another kind is told."""


RUN_CONFIG = ConfigKind("config", "", "")
CLUSTER_FILE = ConfigKind("cluster", "clusters", "`local`, ", ("model", "data", "train"))
_MOST_SUGGESTIONS = 5


class _Loader(yaml.SafeLoader):
    """safe_load, with YAML 1.2 numbers, and with repeated keys and values without bounds refused.

    `1e-5` is a number. `010`, `1:30` and `2026-11-28` are text, not YAML 1.1's octal number, number of base 60 and
    date: where a number is wanted they are refused by the key's own check.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._extents: dict[int, tuple[int, int]] = {}
        """Depth and number of values, with aliases written out, of the composed nodes by their id."""
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Next node of the document.

        Raises:
            yaml.MarkedYAMLError: it is nested too deeply, holds itself, or stands for too many values.
        """
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {_MAX_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._extents:
            if is_alias:  # of a node that is not finished
                raise yaml.MarkedYAMLError(problem="a value must not hold an alias of itself", problem_mark=mark)
            self._extents[id(node)] = self._extent(node, mark)
        return node

    def _extent(self, node: yaml.Node, mark: Any) -> tuple[int, int]:
        depth, count = 0, 1
        for child in _children(node):
            inner, values = self._extents[id(child)]
            depth, count = max(depth, inner), count + values
        if depth >= _MAX_DEPTH or count > _MAX_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {_MAX_VALUES} values or {_MAX_DEPTH} levels, with aliases written out",
                problem_mark=mark,
            )
        return depth + 1, count

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Value of a node.

        Raises:
            yaml.MarkedYAMLError: the node's text is no value of its type, like `!!int x`.
        """
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{shown(node.value)} cannot be read as YAML's type {kind}", problem_mark=node.start_mark
            ) from error


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)$"),
    # A dot or an exponent makes a float.
    "tag:yaml.org,2002:float": re.compile(
        r"^([-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))"
        r"|\.(nan|NaN|NAN))$"
    ),
}
_OWN_RULES = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in _OWN_RULES]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""), 0)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[object, object]:
    if not isinstance(node, yaml.MappingNode):
        raise TypeError(f"{node.tag} of what is no mapping")
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
    except yaml.reader.ReaderError as error:
        line = f" line {text.count(chr(10), 0, error.position) + 1}"
        raise ConfigError(f"{origin}{line}: not valid YAML: the character {chr(error.character)!a}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error


def packaged_config(path: str | Path) -> Path | None:
    """The packaged file that a relative path or a bare name stands for; `None` where the user's own file is there.

    `configs/tiny.yaml` and `tiny` name configs/tiny.yaml of this package, `h100-256` a file of its configs/clusters/.
    """
    if Path(path).is_absolute() or os.path.isfile(path):
        return None
    name = str(path).removeprefix("./").removeprefix("configs/")
    if ".." in Path(name).parts:
        return None
    candidates = [PACKAGED_CONFIGS / file for file in (name, f"{name}.yaml", f"clusters/{name}.yaml")]
    return next((file for file in candidates if os.path.isfile(file)), None)


def read_yaml(path: str | Path, *, kind: ConfigKind = RUN_CONFIG) -> dict[str, Any]:
    """The mapping in a YAML file, the user's own or the packaged one of that name (see `packaged_config`).

    Args:
        kind: what is looked for, for the suggestions of an error.

    Raises:
        MissingFileError: no file at `path`.
        ConfigError: not YAML, or not a mapping.
    """
    try:
        text = _read_text(packaged_config(path) or Path(path))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise MissingFileError(_no_config(path, kind)) from error
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # not readable, a name that is too long, a null character
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError(f"{path}: must be UTF-8 text, got {error}") from error
        raise ConfigError(f"{str(path)!r} cannot be read as a config file: {error}") from error
    raw = parse_yaml(text, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections, got {type(raw).__name__}")
    if foreign := [key for key in kind.foreign if key in raw]:
        raise ConfigError(
            f"{path}: is no {kind.name} file: it has {', '.join(foreign)}, as the config of a run. Give "
            f"{kind.besides}the path of a YAML file or the name of a packaged one, like configs/clusters/laptop.yaml"
        )
    return raw


def _read_text(path: Path) -> str:
    """Text of a file, or of a pipe that somebody writes to, like a shell's `<(command)`.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is no UTF-8.
        ConfigError: it is a device or a socket, which may have no end, or larger than any configuration.
    """
    kind = path.stat().st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(str(path))
    if not stat.S_ISREG(kind) and not stat.S_ISFIFO(kind):
        raise ConfigError(f"{path}: a config is a YAML file, and this is a device or a socket")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as handle:
        first = handle.raw.read(1)  # None where somebody has the pipe open and has not written yet
        if stat.S_ISFIFO(kind) and first == b"":
            raise ConfigError(f"{path}: is a pipe that nobody writes to. Give the path of a YAML file")
        os.set_blocking(handle.fileno(), True)
        content = (first or b"") + handle.read(_MAX_BYTES)
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: a config is a YAML file of at most {_MAX_BYTES:,} bytes, and this has more")
    return content.decode("utf-8")


def _no_config(path: str | Path, kind: ConfigKind) -> str:
    """Sentences on a config file that is not there: files of a similar name, else the packaged ones."""
    packaged = sorted((PACKAGED_CONFIGS / kind.folder).glob("*.yaml"))
    names = [file.relative_to(PACKAGED_CONFIGS).as_posix() for file in packaged]
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    own = sorted(str(file) for file in folder.glob("*.y*ml")) if os.path.isdir(folder) else []
    known = [*own, *(f"configs/{name}" for name in names)]
    stem = Path(path).stem
    # By the file's name alone: one in another folder is as likely meant as one that is spelt in another way.
    close = difflib.get_close_matches(stem, {Path(name).stem for name in known}, n=3)
    meant = [name for one in close for name in known if Path(name).stem == one]
    if os.path.isdir(path):
        reason = f"{path} is a folder, and a {kind.name} is a YAML file"
        meant = meant or own[:_MOST_SUGGESTIONS]
    else:
        reason = f"no {kind.name} file at {path}"
    if meant:
        return f"{reason}. Did you mean {' or '.join(dict.fromkeys(meant))}?"
    return f"{reason}. Give {kind.besides}the path of a YAML file or the name of a packaged one: {', '.join(names)}"


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
            raise ConfigError(
                f"{origin}: {printable(prefix + key)} must be a section to set its keys (got {shown(old)})"
            )
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
        if not equals or not all(path) or len(path) > _MAX_DEPTH // 2:
            wrong.append(f"override {shown(override)}: must read dotted.key=value, like train.learning_rate=2e-6")
            continue
        try:
            changes = _override_value(text, f"override {printable(key.strip())}")
        except ConfigError as error:
            wrong.append(str(error))
            continue
        for name in reversed(path):
            changes = {name: changes}
        try:
            result = merge(result, changes, origin=f"override {shown(override)}")
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return result


def _override_value(text: str, origin: str) -> Any:
    """Value of an override's text. It is one value: what YAML takes for a comment or a mapping is part of it.

    Raises:
        ConfigError: not YAML; or something follows a list, a mapping or a quoted text, which would be lost.
    """
    written = text.strip()
    value = parse_yaml(text, origin)
    node = yaml.compose(text, Loader=_Loader)
    if node is None:
        return written or None
    rest = text[node.end_mark.index :].strip()
    if not written.startswith(("[", "{", '"', "'", "!", "&", "|", ">")):
        return written if rest or isinstance(value, list | dict) else value
    if rest:
        raise ConfigError(
            f"{origin}: {shown(rest)} would be read as a comment and lost. Put the whole value in quotes."
        )
    return value


def shown(value: object) -> str:
    """A value for an error's text: cut after 80 characters, and without passwords."""
    return _shortened(without_credentials(repr(value)))


def printable(text: str) -> str:
    """A name or path for an error's text: in one line, cut after 80 characters, without what a terminal acts on."""
    return _shortened(text if text.isprintable() else repr(text)[1:-1])


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
