"""Every key of a configuration is read by the code that it configures, and every flag of a program by that program.

mypy types the whole code, so a read counts only where the object is of the key's own section.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mypy import build
from mypy.modulefinder import BuildSource
from mypy.options import Options
from mypy.plugin import AttributeContext, MethodContext, Plugin
from mypy.types import Type

from base.config import Section
from cherry.cluster import ClusterSpec
from tasks.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("base", "model", "cherry", "anything", "tasks", "flows")
READ_OTHERWISE = {
    "ModelConfig.preset": "fills the other keys before they are validated",
}
PROGRAMS = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if ".add_argument(" in path.read_text()
)


def sections_of(section: type[Section]) -> Iterator[type[Section]]:
    """The section and every section inside it."""
    yield section
    for field in section.model_fields.values():
        for inner in classes_in(field.annotation):
            yield from sections_of(inner)


def classes_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from classes_in(argument)


@dataclass(frozen=True)
class Read:
    """One read of an attribute or call of a method; the reader is "" in what stands in no class."""

    owner: str
    """The class that defines it."""
    name: str
    reader: str
    method: str


class Reads(Plugin):
    """Collects from mypy, by file and line, what is read of the sections' attributes."""

    def __init__(self, options: Options, owners: set[str]) -> None:
        super().__init__(options)
        self.owners = owners
        self.found: set[tuple[str, str, int]] = set()

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        if fullname.rpartition(".")[0] not in self.owners:
            return None
        return lambda context: self._take(fullname, context, context.default_attr_type)

    def get_method_hook(self, fullname: str) -> Callable[[MethodContext], Type] | None:
        if fullname.rpartition(".")[0] not in self.owners:
            return None
        return lambda context: self._take(fullname, context, context.default_return_type)

    def _take(self, fullname: str, context: AttributeContext | MethodContext, result: Type) -> Type:
        self.found.add((fullname, context.api.path, context.context.line))
        return result


def methods(path: Path, module: str) -> Iterator[tuple[str, str, range]]:
    """(class, method, lines) of every method of a module's classes, and of the classes' bodies around them, as ""."""
    for cls in ast.parse(path.read_text()).body:
        if isinstance(cls, ast.ClassDef):
            for method in (*cls.body, cls):
                if isinstance(method, ast.FunctionDef | ast.ClassDef):
                    name = method.name if method is not cls else ""
                    yield f"{module}.{cls.name}", name, range(method.lineno, (method.end_lineno or 0) + 1)


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def schemas() -> set[type[Section]]:
    bases = [cls for root in (RunConfig, ClusterSpec) for cls in root.__mro__ if issubclass(cls, Section)]
    return {section for base in bases if base is not Section for section in sections_of(base)}


@pytest.fixture(scope="module")
def reads() -> set[Read]:
    """Every read of a section's attributes in the packages."""
    options = Options()
    options.ignore_missing_imports = options.check_untyped_defs = True
    options.incremental = False
    options.follow_imports = "skip"  # the libraries' types are not needed, and take a minute
    sources = {}
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[str(path)] = BuildSource(str(path), ".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    plugin = Reads(options, {full_name(section) for section in schemas()})
    build.build(list(sources.values()), options, extra_plugins=[plugin])
    # What a section inherits counts for the one that defines it.
    defined_by = {
        (full_name(section), name): full_name(base)
        for section in schemas()
        for base in reversed(section.__mro__)
        if base in schemas()
        for name in {*vars(base), *base.__annotations__}
    }
    within = {path: list(methods(Path(path), source.module)) for path, source in sources.items()}
    found = set()
    for fullname, path, line in plugin.found:
        owner, _, name = fullname.rpartition(".")
        owner = defined_by.get((owner, name), owner)
        reader, method = next(((cls, name) for cls, name, lines in within[path] if line in lines), ("", ""))
        found.add(Read(owner, name, reader, method))
    return found


def effective(reads: set[Read]) -> set[tuple[str, str]]:
    """(class, name) of what code outside the sections reads, itself or by a method that it calls."""
    sections = {full_name(section) for section in schemas()}
    used = {(read.owner, read.name) for read in reads if read.reader not in sections}
    while more := {(read.owner, read.name) for read in reads if (read.reader, read.method) in used} - used:
        used |= more
    return used


def test_every_key_of_a_config_has_a_reader(reads: set[Read]) -> None:
    used = effective(reads)
    deaf = {
        f"{section.__name__}.{name}"
        for section in schemas()
        for name in section.model_fields
        if name in section.__annotations__ and (full_name(section), name) not in used
    }
    assert deaf - READ_OTHERWISE.keys() == set()


def test_the_exceptions_are_keys() -> None:
    assert READ_OTHERWISE.keys() <= {f"{cls.__name__}.{name}" for cls in schemas() for name in cls.model_fields}


def flags_of(call: ast.Call) -> tuple[str, list[str]]:
    """The name of an argument's value, and its spellings."""
    names = [str(argument.value) for argument in call.args if isinstance(argument, ast.Constant)]
    named = [str(key.value.value) for key in call.keywords if key.arg == "dest" and isinstance(key.value, ast.Constant)]
    return (named or [name.lstrip("-").replace("-", "_") for name in names])[0], names


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_of_a_program_is_read_by_it(path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
    ]
    spelled = {id(argument) for call in calls for argument in call.args}
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {
        str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in spelled
    }  # getattr
    assert [name for name, _ in map(flags_of, calls) if name not in read] == []


def test_every_flag_of_the_launcher_is_known_with_dashes_and_with_underscores() -> None:
    from torch.distributed.run import get_args_parser

    for action in get_args_parser()._actions:
        spelled = {name for name in action.option_strings if name.startswith("--")}
        assert {name.replace("_", "-") for name in spelled} == {name for name in spelled if "_" not in name}
        assert all("--" + name[2:].replace("-", "_") in spelled for name in spelled)
