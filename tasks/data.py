"""The data step: documents are tokenized into shards, and the dataset is recorded by reference.

Runs of the same documents, tokenizer and code share their shards: see tasks/files/data_store.py.
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from cherry.data.corpus import source_version
from cherry.data.prepare import prepare
from cherry.data.shards import Manifest, read_manifest
from cherry.data.tokenizer_files import given_files
from cherry.job_config import weights_folder
from tasks.files.data_store import mark_used, share
from tasks.steps import RunContext, StepRecord, StepRun, make_room, perform, sections, worth_retrying
from tasks.tracking.protocol import Dataset


@task(
    name="data",
    task_run_name="data",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=worth_retrying,
)
def prepare_data(context: RunContext) -> StepRecord:
    """Tokenize the run's documents, unless that is done."""
    config = context.config
    model = config.model
    inputs: dict[str, object] = {
        **sections(config, ["data"]),
        "source_version": source_version(config.data.source),
        "vocab_size": model.vocab_size,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
    }
    weights = None if config.init_from is None else weights_folder(config.init_from)
    inputs.update(given_files(config.data, weights))
    folder = context.path / "data"

    def work(step: StepRun) -> dict[str, str]:
        def fill(directory: str) -> None:
            prepare(
                config.data,
                vocab_size=model.vocab_size,
                directory=directory,
                bos_id=model.bos_token_id,
                eos_id=model.eos_token_id,
                weights=weights,
                on_progress=step.say,
            )

        if not folder.is_symlink():
            make_room(context, "data", folder, step.fingerprint)
        share(folder, step.fingerprint, fill, say=step.say)
        manifest = read_manifest(str(folder))
        step.metrics(
            documents=manifest.documents, bytes=manifest.bytes, tokens=manifest.tokens, sequences=manifest.sequences
        )
        step.tracker.log(step.run_id, tags={"data_digest": manifest.digest, "data_source": manifest.source})
        step.tracker.log(step.run_id, inputs=[_dataset(config.data.source, manifest)])
        return {"data": str(folder)}

    record = perform(context, "data", inputs, work)
    mark_used(folder)
    # The flow's run takes the data, whichever run has prepared it.
    dataset = _dataset(config.data.source, read_manifest(record.outputs["data"]))
    context.tracker().runs.log(context.parent_run_id, inputs=[dataset])
    return record


def _dataset(name: str, manifest: Manifest) -> Dataset:
    profile = {"documents": manifest.documents, "tokens": manifest.tokens, "bytes": manifest.bytes}
    return Dataset(name, manifest.digest, manifest.source, profile)
