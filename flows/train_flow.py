"""The training flow: provision, data, train, export, quantize, evaluate, register.

Flow retries stay at 0: each task retries transient errors itself.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.data import prepare_data
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.lifecycle import begin, conclude, run_name, teardown
from tasks.overrides import DEFAULT_CONFIG, NO_OVERRIDES, ConfigParameter, Overrides
from tasks.provision import provision, release
from tasks.quantize import quantize
from tasks.register import register
from tasks.train import train


@flow(
    name="train-flow",
    flow_run_name=run_name,
    on_cancellation=[teardown],
    on_crashed=[teardown],
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
        quantized = quantize(context, exported)
        evaluated = evaluate(context, data, exported, quantized)
        register(context, exported, quantized, evaluated)
    except BaseException as error:
        conclude(context, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    finally:
        release(context.directory)
    return conclude(context, "FINISHED")
