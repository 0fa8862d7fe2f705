"""Private names of libraries that the packages use, each with its users: pyproject.toml bounds these libraries.

A test fails when a name is gone, and when one is used that is not listed here. Before adding a name, look for a public
one; after adding it, see that pyproject.toml bounds its library below the next minor release.
"""

from __future__ import annotations

import argparse
import ast
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("base", "model", "cherry", "anything", "tasks", "flows")
HOOKS = "cherry/distributed/fsdp_hooks.py"
RESIDENT = "cherry/distributed/resident_group.py"
_FSDP = "torch.distributed.fsdp._fully_shard"
IMPORTS: dict[str, set[str]] = {
    "torch.distributed._symmetric_memory.empty": {"cherry/distributed/peer_memory.py"},
    "torch.distributed._symmetric_memory.rendezvous": {"cherry/distributed/peer_memory.py"},
    "torch.distributed.checkpoint._fsspec_filesystem.FsspecReader": {"cherry/checkpoint/checkpointer.py"},
    "torch.distributed.checkpoint._fsspec_filesystem.FsspecWriter": {"cherry/checkpoint/checkpointer.py"},
    f"{_FSDP}._fsdp_api.ReduceScatter": {HOOKS},
    f"{_FSDP}._fsdp_collectives.DefaultAllGather": {HOOKS, "cherry/distributed/compression.py"},
    f"{_FSDP}._fsdp_collectives.DefaultAllocMixin": {HOOKS},
    f"{_FSDP}._fsdp_collectives.DefaultReduceScatter": {HOOKS},
    f"{_FSDP}._fsdp_common.DDPMeshInfo": {HOOKS},
    f"{_FSDP}._fsdp_common.FSDPMeshInfo": {HOOKS, RESIDENT},
    f"{_FSDP}._fsdp_common.HSDPMeshInfo": {HOOKS, RESIDENT},
    f"{_FSDP}._fsdp_param_group.FSDPParamGroup": {HOOKS},
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": {"cherry/distributed/local_part.py"},
    "torch.distributed.tensor.placement_types._StridedShard": {HOOKS},
}
"""Imports of a private module or a private name."""
ATTRIBUTES: dict[str, set[str]] = {
    "_all_gather_process_group": {RESIDENT},
    "_apply": {"model/layers.py"},
    "_buffers": {"cherry/distributed/fsdp.py"},
    "_coalescing_manager": {RESIDENT},
    "_dump_snapshot": {"cherry/hooks/profiler.py"},
    "_foreach_add_": {"cherry/optim/adamw.py", "cherry/optim/muon.py"},
    "_foreach_copy_": {"cherry/optim/muon.py"},
    "_foreach_mul": {"cherry/optim/muon.py"},
    "_foreach_mul_": {"cherry/optim/muon.py"},
    "_foreach_norm": {"cherry/optim/grad_norm.py"},
    "_foreach_zero_": {"cherry/optim/expert_bias.py"},
    "_fsdp_param_group": {HOOKS, RESIDENT},
    "_get_fsdp_state": {HOOKS, RESIDENT},
    "_grouped_mm": {"model/experts.py"},
    "_option_string_actions": {"base/errors.py"},
    "_record_memory_history": {"cherry/hooks/profiler.py"},
    "_spec": {"cherry/checkpoint/staging.py"},
}
"""Private attributes of a library's module or object."""
UNDOCUMENTED: dict[str, set[str]] = {
    "prefect.server.api.server.background_worker": {"flows/prefect_server.py"},
    "torch.distributed.distributed_c10d.default_pg_nccl_timeout": {"cherry/distributed/group_timeout.py"},
    "torch.distributed.distributed_c10d.default_pg_timeout": {"cherry/distributed/group_timeout.py"},
    "torch.distributed.run.config_from_args": {"cherry/launcher.py"},
    "torch.distributed.run.determine_local_world_size": {"cherry/launcher.py"},
    "torch.distributed.run.get_args_parser": {"cherry/launcher.py"},
    "torch.distributed.run.parse_min_max_nnodes": {"cherry/launcher.py"},
}
"""Names without an underscore that no documentation promises; they are listed by hand."""
# The standard library's: os._exit, and the methods of named tuples.
DOCUMENTED = {"os._exit", "_replace", "_asdict"}


def owner_of(attribute: str) -> object:
    """The library's object that must have the attribute."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    from torch.distributed.tensor import DTensor

    owners: dict[str, Callable[[], object]] = {
        "_all_gather_process_group": lambda: FSDPParamGroup,
        "_apply": torch.nn.Module,
        "_buffers": torch.nn.Module,
        "_coalescing_manager": lambda: torch.distributed,
        "_dump_snapshot": lambda: torch.cuda.memory,
        "_option_string_actions": argparse.ArgumentParser,
        "_record_memory_history": lambda: torch.cuda.memory,
        "_fsdp_param_group": FSDPState,
        "_get_fsdp_state": lambda: FSDPModule,
        "_spec": lambda: DTensor,
    }
    return owners.get(attribute, lambda: torch)()


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def private_uses(path: Path) -> Iterator[tuple[str, str]]:
    """("import", dotted name) and ("attribute", name) of every private name of others that a file uses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own_modules, defined = set[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if is_own(name):
                    own_modules.add(alias.asname or alias.name)
                elif any(map(is_private, name.split("."))):
                    yield "import", name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if any(map(is_private, alias.name.split("."))):
                    yield "import", alias.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [inner for target in targets for inner in ast.walk(target)]
            stored = [inner for inner in names if isinstance(inner, ast.Attribute)]
            defined |= {inner.attr for inner in stored if ast.unparse(inner.value) in ("self", "cls")}
            defined |= {inner.id for inner in names if isinstance(inner, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            receiver = ast.unparse(node.value)
            ours = receiver in own_modules or (node.attr in defined and receiver != "super()")
            if not ours and not DOCUMENTED & {node.attr, f"{receiver}.{node.attr}"}:
                yield "attribute", node.attr


def uses_of(kind: str) -> dict[str, set[str]]:
    """Every private name of this kind, with the files that use it."""
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for one_kind, name in private_uses(path):
                if one_kind == kind:
                    found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(("kind", "listed"), [("import", IMPORTS), ("attribute", ATTRIBUTES)])
def test_every_private_name_is_listed_with_its_users(kind: str, listed: dict[str, set[str]]) -> None:
    assert uses_of(kind) == listed


@pytest.mark.parametrize("name", [*IMPORTS, *UNDOCUMENTED])
def test_an_imported_name_is_there(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_attribute_is_there(attribute: str) -> None:
    assert hasattr(owner_of(attribute), attribute)


@pytest.mark.parametrize(("name", "files"), UNDOCUMENTED.items())
def test_an_undocumented_name_is_still_used(name: str, files: set[str]) -> None:
    assert all(name.rpartition(".")[2] in (ROOT / file).read_text(encoding="utf-8") for file in files)


def test_libraries_with_private_names_are_bounded_below_the_next_minor_release() -> None:
    import tomllib

    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {(parsed := Requirement(line)).name: parsed.specifier for line in project["dependencies"]}
    libraries = {name.split(".")[0] for name in (*IMPORTS, *UNDOCUMENTED)} | {"torch"}
    assert libraries == {"torch", "prefect"}
    assert not bounds["torch"].contains("2.14.0") and all(bounds["torch"].contains(v) for v in ("2.11.0", "2.13.0"))
    assert not bounds["prefect"].contains("3.9.0") and bounds["prefect"].contains("3.8.8")


def test_a_new_private_name_is_found(tmp_path: Path) -> None:
    source = tmp_path / "new.py"
    source.write_text(
        "import torch._dynamo\nfrom torch.x import _y\nfrom model import experts\nimport os\n"
        "class Own:\n    _kept: int\n    def _method(self):\n"
        "        self._kept = experts._ours(self._method(), torch.cuda.memory._snapshot())\n"
        "        os._exit(self._inherited)\n"
    )
    assert sorted(private_uses(source), key=lambda use: (use[0] != "import", use[1])) == [
        ("import", "torch._dynamo"),
        ("import", "torch.x._y"),
        ("attribute", "_inherited"),
        ("attribute", "_snapshot"),
    ]
