"""The logger of step code, inside a Prefect run and outside of one."""

from __future__ import annotations

import logging
import uuid

import pytest
from prefect.client.schemas import FlowRun
from prefect.context import FlowRunContext

from flows.train_flow import train_flow
from tasks.run_logger import in_prefect_run, run_logger


def test_outside_of_a_run_lines_go_to_the_modules_logger(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tasks.run_logger")
    assert not in_prefect_run()
    run_logger().info("a line")
    assert [(record.name, record.message) for record in caplog.records] == [("tasks.run_logger", "a line")]


def test_inside_of_a_run_lines_go_to_prefect_with_the_runs_name() -> None:
    run = FlowRun(flow_id=uuid.uuid4(), name="mine")
    with FlowRunContext.model_construct(flow=train_flow, flow_run=run):
        assert in_prefect_run()
        logger = run_logger()
    assert isinstance(logger, logging.LoggerAdapter)
    assert logger.logger.name == "prefect.flow_runs"
    assert logger.extra is not None
    assert (logger.extra["flow_run_name"], logger.extra["flow_name"]) == ("mine", "train-flow")
    assert not in_prefect_run()
