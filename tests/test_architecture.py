"""Which way imports go, between packages and between rooms, and that a worker and the gateway need no torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARROWS = ROOT / "tests" / "room_arrows.json"
# flows -> tasks -> { cherry | anything } -> model -> base
MAY_IMPORT = {
    "base": set[str](),
    "model": {"base"},
    "cherry": {"model", "base"},
    "anything": {"model", "base"},
    "tasks": {"cherry", "anything", "model", "base"},
    "flows": {"tasks", "cherry", "anything", "model", "base"},
}
WITHOUT_TORCH = (
    "anything.http.app",
    "anything.client",
    "anything.router.kinds",
    "anything.router.routing",
    "anything.statistics.compare",
    "anything.serve_config",
    "cherry.cluster",
    "cherry.job_config",
    "cherry.launcher",
    "model.model_config",
    "model.numerics.formats",
)
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import statement, inside functions too; string literals of importlib as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the arrows"
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            for argument in node.args:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == package]
    assert files
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for line, module in imports(path)
        if module.split(".")[0] in {*MAY_IMPORT, "tests", "benchmarks", "train"} - allowed
    ]
    assert wrong == []


def room_of(module: str) -> str:
    """A folder of a package, or a file at its top: `cherry.data`, `cherry.trainer`."""
    return ".".join(module.split(".")[:2])


def arrows_between_rooms() -> dict[str, set[str]]:
    """What each room imports of its own package's other rooms."""
    modules = {module_of(path) for path in FILES}
    found: dict[str, set[str]] = {}
    for path in FILES:
        room = room_of(module_of(path))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                other = room_of(name if name in modules else str(node.module))
                if other != room and other.split(".")[0] == room.split(".")[0]:
                    found.setdefault(room, set()).add(other)
    return found


def arrows_of_today() -> str:
    """The imports between rooms, package by package, as tests/room_arrows.json holds them: a line for each room."""
    arrows = arrows_between_rooms()
    blocks = []
    for package in MAY_IMPORT:
        rooms = {room: others for room, others in arrows.items() if room.split(".")[0] == package}
        lines = [
            f"    {json.dumps(room)}: {json.dumps(sorted(other.removeprefix(f'{package}.') for other in others))}"
            for room, others in sorted((room.removeprefix(f"{package}."), others) for room, others in rooms.items())
        ]
        blocks.append(f"  {json.dumps(package)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def test_rooms_import_what_the_table_says() -> None:
    """A new arrow is a decision. Once it is made: python tests/test_architecture.py > tests/room_arrows.json."""
    today, table = json.loads(arrows_of_today()), json.loads(ARROWS.read_text(encoding="utf-8"))
    pairs = [
        {
            (f"{package}/{room}", other)
            for package, rooms in of.items()
            for room, others in rooms.items()
            for other in others
        }
        for of in (today, table)
    ]
    new = sorted(f"{room} -> {other}" for room, other in pairs[0] - pairs[1])
    gone = sorted(f"{room} -> {other}" for room, other in pairs[1] - pairs[0])
    assert (new, gone) == ([], []), f"today's table is:\n{arrows_of_today()}"


def test_no_circle_between_rooms() -> None:
    with_arrows = arrows_between_rooms()
    try:
        list(TopologicalSorter(with_arrows).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_circle_between_files() -> None:
    modules = {module_of(path) for path in FILES}
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    # `from package import module` imports the package's own file too.
                    arrows.setdefault(module_of(path), set()).update({name, str(node.module)} & modules)
    for module, others in arrows.items():
        others.discard(module)  # a package's own name, where a file of it is imported from it
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_folder_is_flat() -> None:
    """A folder that a newcomer opens holds at most twenty files."""
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in {path.parent for path in FILES}
        if (count := len(list(folder.glob("*.py"))) - 1) > 20
    }
    assert crowded == {}


def test_few_files_know_mlflow() -> None:
    importers = {
        str(path.relative_to(ROOT)) for path in FILES for _, module in imports(path) if is_of(module, "mlflow")
    }
    names = ("mlflow_claim", "mlflow_connection", "mlflow_registry", "mlflow_tracker")
    assert importers == {f"tasks/tracking/{name}.py" for name in names}


def test_prefect_stays_in_tasks_and_flows() -> None:
    packages = {
        path.relative_to(ROOT).parts[0] for path in FILES for _, name in imports(path) if is_of(name, "prefect")
    }
    assert packages == {"tasks", "flows"}


def test_one_file_shards() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "fully_shard"
    }
    assert users == {"cherry/distributed/fsdp.py"}


def is_of(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def light_modules() -> list[str]:
    existing = [module_of(path) for path in FILES]
    whole = ("base", "tasks", "flows", "cherry.planner")
    return [name for name in existing if any(is_of(name, one) for one in whole) or name in WITHOUT_TORCH]


def test_a_worker_and_the_gateway_need_no_torch() -> None:
    """One process imports them one after the other, and names the first that brings torch in."""
    modules = light_modules()
    known = {"flows.train_flow", "flows.deploy_flow", "anything.http.app", "cherry.launcher", "cherry.planner.plan"}
    assert known <= set(modules)
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'{name} imports torch')\n"
    )
    command = [sys.executable, "-c", program, *modules]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr


def test_importing_a_package_does_no_work() -> None:
    """Constants, definitions and the logger stand at the top of a module: no call that is a statement by itself."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not registers_with_yaml(node.value)
    ]
    assert wrong == []


def registers_with_yaml(call: ast.Call) -> bool:
    """base/yaml_config.py's own loader class gets its constructors so; PyYAML has no other way."""
    return ast.unparse(call.func).startswith("_Loader.add_")


def test_the_router_and_the_http_api_do_not_know_each_other() -> None:
    """They meet in the engine protocol; the command line puts one in front of the other."""
    rooms = {"anything.router": "anything.http", "anything.http": "anything.router"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        for line, module in imports(path)
        if (other := rooms.get(room_of(module_of(path)))) is not None and is_of(module, other)
    ]
    assert wrong == []


if __name__ == "__main__":
    print(arrows_of_today(), end="")
