"""A file's tests carry its name: tests/<folder>/test_<file>.py or test_<file>_gpu.py, but for the listed exceptions."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("base", "model", "cherry", "anything", "tasks", "flows")

# Module -> the test file that proves it, where that carries another name.
EXCEPTIONS = {
    "model/fp8/tile_kernels.py": "tests/model/fp8/test_cast_kernels_gpu.py",
    # A protocol alone: proved by the optimizers that are built.
    "cherry/optim/protocol.py": "tests/cherry/optim/test_build.py",
    # Tables of the commands, and the flow as a server starts it.
    "flows/clusters/tables.py": "tests/flows/clusters/test_command.py",
    "flows/clusters/reap_flow.py": "tests/e2e/test_reaping.py",
    # Which hooks a configuration asks for shows in what they write.
    "cherry/hooks/build.py": "tests/cherry/hooks/test_profiler.py",
    # Several ranks, and GPUs that reach each other's memory.
    "cherry/distributed/resident_group.py": "tests/dist/test_layouts.py",
    "cherry/distributed/peer_memory.py": "tests/dist/test_layouts_gpu.py",
    "cherry/distributed/peer_exchange.py": "tests/dist/test_layouts_gpu.py",
    "cherry/distributed/lane.py": "tests/dist/test_layouts_gpu.py",
    # What they do shows on hosts that are lost.
    "cherry/remote/attempt.py": "tests/chaos/test_lost_hosts.py",
    "cherry/remote/supervisor.py": "tests/chaos/test_lost_hosts.py",
    # What a server does with events shows when it is restarted.
    "tasks/interruptions/unseen_events.py": "tests/e2e/test_restarted_server.py",
}


def modules() -> list[str]:
    """Paths of all modules below the packages, relative to the repository."""
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def named_tests(module: str) -> list[Path]:
    """Test files that carry a module's name."""
    folder, stem = ROOT / "tests" / Path(module).parent, Path(module).stem
    return [path for path in (folder / f"test_{stem}.py", folder / f"test_{stem}_gpu.py") if path.exists()]


@pytest.mark.parametrize("module", modules())
def test_a_module_has_tests_of_its_name(module: str) -> None:
    if module in EXCEPTIONS:
        assert not named_tests(module), f"{module} has tests of its name: take it out of EXCEPTIONS"
        assert (ROOT / EXCEPTIONS[module]).exists(), f"{EXCEPTIONS[module]} is gone: name the file that proves {module}"
    else:
        folder = Path("tests") / Path(module).parent
        assert named_tests(module), (
            f"no {folder}/test_{Path(module).stem}.py: move its tests there, or add an exception"
        )


def test_an_exception_is_of_a_module_that_is_there() -> None:
    assert sorted(EXCEPTIONS.keys() - set(modules())) == []


def test_test_files_are_found_by_the_module_s_folder_and_name() -> None:
    assert named_tests("cherry/planner/units.py") == [ROOT / "tests" / "cherry" / "planner" / "test_units.py"]
    assert named_tests("cherry/planner/no_such_module.py") == []
