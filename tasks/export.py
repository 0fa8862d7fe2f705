"""The export step: the trained checkpoint as a Hugging Face folder, written by a subprocess."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.steps import RunContext, StepRecord, StepRun, make_room, perform, worth_retrying


@task(
    name="export",
    task_run_name="export",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=worth_retrying,
)
def export(context: RunContext, trained: StepRecord) -> StepRecord:
    """Export the trained weights in bf16 to `<run>/export`."""

    def work(step: StepRun) -> dict[str, str]:
        folder = context.path / "export"
        make_room(context, "export", folder, step.fingerprint)
        arguments = ["--run_dir", context.directory, "--dtype", "bf16", "--checkpoint", trained.outputs["checkpoint"]]
        step.run("cherry.export", arguments)
        step.metrics(bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")))
        return {"export": str(folder)}

    return perform(context, "export", {"train_fingerprint": trained.fingerprint, "dtype": "bf16"}, work)
