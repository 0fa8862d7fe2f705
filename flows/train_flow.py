"""The training flow: provision, data, train, export, quantize, evaluate, register.

Flow retries stay at 0: each task retries transient errors itself.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.data import prepare_data
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.interruptions.leftovers import teardown
from tasks.interruptions.states import describe
from tasks.lifecycle import begin, conclude
from tasks.overrides import DEFAULT_CONFIG, NO_OVERRIDES, ConfigParameter, Overrides
from tasks.provision import provision, release
from tasks.quantize import quantize
from tasks.records.run_names import run_name
from tasks.register import is_outdated, register
from tasks.train import train

# Runs that end together may each find another champion than the one that they compared with.
_COMPARISONS = 5


@flow(
    name="train-flow",
    flow_run_name=run_name,
    on_cancellation=[teardown, describe],
    on_crashed=[teardown, describe],
    on_failure=[teardown],
    validate_parameters=True,
)
def train_flow(config: ConfigParameter = DEFAULT_CONFIG, overrides: Overrides = NO_OVERRIDES) -> dict[str, Any]:
    """Take a model from documents to a registered version; returns the summary.

    Args:
        config: path of a YAML config.
        overrides: keys of the config, nested, that win over the file.
    """
    context = begin(config, overrides)
    retry = context.config.retry
    try:
        provision(context)
        data = prepare_data(context)
        trained = train.with_options(retries=retry.attempts - 1, retry_delay_seconds=retry.delay_s)(context, data)
        exported = export(context, trained)
        quantized = quantize(context, data, exported)
        for _ in range(_COMPARISONS):
            evaluated = evaluate(context, data, exported, quantized)
            if not is_outdated(register(context, exported, quantized, evaluated)):
                break
    except BaseException as error:
        conclude(context, "FAILED" if isinstance(error, Exception) else "KILLED", error)
        raise
    finally:
        release(context.directory)
    return conclude(context, "FINISHED")
