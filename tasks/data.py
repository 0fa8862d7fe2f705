"""Owns the data step: documents become token shards, and the dataset is recorded by reference.

It knows nothing of how they are packed; that is cherry/data/prepare.py's.
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from cherry.data.corpus import source_version
from cherry.data.prepare import prepare
from tasks.steps import RunContext, StepRecord, StepRun, perform, sections, worth_retrying


@task(name="data", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2, retry_condition_fn=worth_retrying)
def prepare_data(context: RunContext) -> StepRecord:
    """Prepare the run's data, or find it prepared."""
    config = context.config
    model = config.model
    inputs = {
        **sections(config, ["data"]),
        "source_version": source_version(config.data.source),
        "vocab_size": model.vocab_size,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
    }
    directory = str(context.path / "data")

    def work(step: StepRun) -> dict[str, str]:
        manifest = prepare(
            config.data,
            vocab_size=model.vocab_size,
            directory=directory,
            bos_id=model.bos_token_id,
            eos_id=model.eos_token_id,
            on_progress=step.say,
        )
        step.metrics(
            documents=manifest.documents, bytes=manifest.bytes, tokens=manifest.tokens, sequences=manifest.sequences
        )
        step.tracker.log(step.run_id, tags={"data_digest": manifest.digest, "data_source": manifest.source})
        profile = f'{{"documents": {manifest.documents}, "tokens": {manifest.tokens}, "bytes": {manifest.bytes}}}'
        for run_id in (step.run_id, context.parent_run_id):
            context.tracker().dataset(
                run_id, name=config.data.source, digest=manifest.digest, source=manifest.source, profile=profile
            )
        return {"data": directory}

    return perform(context, "data", inputs, work)
