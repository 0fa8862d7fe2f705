"""A file's tests carry its name: tests/<folder>/test_<file>.py or test_<file>_gpu.py, but for the listed exceptions."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("base", "model", "cherry", "anything", "tasks", "flows")

# Module -> the test file that proves it, where that carries another name.
EXCEPTIONS = {
    "anything/engine/model_runner.py": "tests/anything/engine/test_embedded.py",
    "anything/http/request.py": "tests/anything/http/test_app.py",
    "anything/http/serve.py": "tests/anything/http/test_drain.py",
    "anything/keys.py": "tests/anything/http/test_app.py",
    "anything/prometheus.py": "tests/anything/http/test_app.py",
    "anything/protocol.py": "tests/anything/engine/test_embedded.py",
    "anything/serve_config.py": "tests/anything/http/test_app.py",
    "anything/sse.py": "tests/anything/test_client.py",
    "anything/testing.py": "tests/anything/test_client.py",
    "base/progress.py": "tests/base/test_json_lines.py",
    "flows/commands.py": "tests/flows/test_cli.py",
    "flows/deploy_flow.py": "tests/e2e/test_release.py",
    "flows/plan_command.py": "tests/flows/test_cli.py",
    "flows/retrain_flow.py": "tests/e2e/test_retrain.py",
    "flows/train_flow.py": "tests/e2e/test_train_flow.py",
    "model/attention.py": "tests/model/test_gpu.py",
    "model/fp8/cast_kernels.py": "tests/model/fp8/test_linear.py",
    "model/fp8/gemm_hopper.py": "tests/model/fp8/test_linear.py",
    "model/fp8/ops.py": "tests/model/fp8/test_linear.py",
    "model/fp8/reference.py": "tests/model/fp8/test_linear.py",
    "model/fp8/tile_kernels.py": "tests/model/fp8/test_linear.py",
    "model/layers.py": "tests/model/test_transformers_parity.py",
    "model/model_config.py": "tests/model/test_counts.py",
    "model/numerics/int8_format.py": "tests/model/numerics/test_formats.py",
    "model/rope.py": "tests/model/test_transformer.py",
    "model/triton_experts.py": "tests/model/test_gpu.py",
    "model/weights/hf_names.py": "tests/model/weights/test_pretrained.py",
    "model/weights/reader.py": "tests/model/weights/test_ranged_read.py",
    "tasks/artifacts.py": "tests/e2e/test_train_flow.py",
    "tasks/data.py": "tests/e2e/test_train_flow.py",
    "tasks/export.py": "tests/e2e/test_train_flow.py",
    "tasks/register.py": "tests/tasks/test_deploy.py",
    "tasks/run_config.py": "tests/tasks/test_overrides.py",
    "tasks/run_logger.py": "tests/tasks/test_steps.py",
    "tasks/tracking/json_tracker.py": "tests/tasks/tracking/test_trackers.py",
    "tasks/tracking/mlflow_connection.py": "tests/tasks/tracking/test_mlflow_tracker.py",
    "tasks/tracking/mlflow_registry.py": "tests/tasks/test_evaluate.py",
    "tasks/tracking/outages.py": "tests/e2e/test_tracking_outage.py",
    "tasks/tracking/protocol.py": "tests/tasks/tracking/test_trackers.py",
    # Protocols alone: proved by the optimizers that are built.
    "cherry/optim/protocol.py": "tests/cherry/optim/test_build.py",
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
