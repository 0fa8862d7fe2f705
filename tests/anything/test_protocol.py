"""Engine protocol: deadlines by a clock, and the sampling fields of a request."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from anything.protocol import DEFAULT_MAX_TOKENS, Deadline, Generation, RefusedError, SamplingParams, UnavailableError
from base.errors import RequestError, ServiceError


def test_a_deadline_runs_out_by_its_clock_and_starts_again() -> None:
    now = 100.0
    deadline = Deadline(30.0, clock=lambda: now)
    assert deadline.remaining_s() == 30.0
    now = 129.0
    assert deadline.remaining_s() == 1.0
    now = 131.0
    assert deadline.remaining_s() == 0.0, "never negative"
    deadline.restart()
    assert deadline.remaining_s() == 30.0
    assert not deadline.expired, "only who gives up says so"
    deadline.expire()
    assert deadline.expired


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"max_tokens": 1, "temperature": 2.0, "seed": 0},
        {"temperature": 1, "seed": 2**63 - 1},
    ],
)
def test_sampling_fields_are_those_of_the_body(raw: dict[str, Any]) -> None:
    sampling = SamplingParams.model_validate(raw)
    assert SamplingParams.model_validate(sampling.as_body()) == sampling
    assert sampling.as_body() == {"max_tokens": DEFAULT_MAX_TOKENS, "temperature": 0.0, **raw}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("seed", -1),
        ("seed", 2**63),
        ("top_k", 1),
    ],
)
def test_a_sampling_field_out_of_range_is_named_and_its_value_is_not_repeated(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field) as caught:
        SamplingParams.model_validate({field: value})
    assert "input_value" not in str(caught.value)


def test_a_prompt_is_in_no_repr() -> None:
    assert "private" not in repr(Generation("private words", SamplingParams()))


def test_a_refusal_is_the_callers_fault_and_an_outage_the_services() -> None:
    refused = RefusedError("too long", status=413, code="too_large")
    assert isinstance(refused, RequestError)
    assert (RefusedError("wrong").status, refused.status, refused.code) == (422, 413, "too_large")
    busy = UnavailableError("busy", status=429, code="overloaded", retry_after_s=1)
    assert isinstance(busy, ServiceError)
    assert (busy.status, busy.code, busy.retry_after_s) == (429, "overloaded", 1)


def test_null_is_the_default() -> None:
    nulls = dict.fromkeys(SamplingParams.model_fields)
    assert SamplingParams.model_validate(nulls) == SamplingParams()
    with pytest.raises(ValidationError, match="max_token"):
        SamplingParams.model_validate({"max_token": None})


@pytest.mark.parametrize("code", ["draining", "loading", "engine_down", "unreachable"])
def test_what_did_not_come_from_the_request_is_worth_another_replica(code: str) -> None:
    assert UnavailableError("x", status=503, code=code).worth_another_replica


@pytest.mark.parametrize("code", ["engine_failed", "replica_failed", "overloaded", "timeout", "generation_failed"])
def test_what_may_have_come_from_the_request_is_not(code: str) -> None:
    assert not UnavailableError("x", status=503, code=code).worth_another_replica
