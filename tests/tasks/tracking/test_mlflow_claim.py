"""The claim of an alias on a server: one process at a time, and not for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from base.errors import OperationalError
from tasks.tracking import mlflow_claim
from tasks.tracking.mlflow_claim import claimed
from tasks.tracking.mlflow_tracker import MlflowTracker

TAG = "cherry.claim.champion"


@pytest.mark.slow
def test_one_at_a_time_has_the_claim(tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_claim, "_SETTLE_S", 0.5)
    client, _ = tracker._connection.get()
    client.create_registered_model("claimed")
    inside: list[int] = []
    begin = threading.Barrier(3)

    def take(number: int) -> None:
        begin.wait()
        with claimed(client, "claimed", TAG):
            inside.append(number)
            assert client.get_registered_model("claimed").tags[TAG]
            assert inside == [number]
            inside.remove(number)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(take, range(3)))
    assert TAG not in client.get_registered_model("claimed").tags


@pytest.mark.slow
def test_the_claim_of_a_process_that_died_expires(tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_claim, "_SETTLE_S", 0.2)
    monkeypatch.setattr(mlflow_claim, "_EXPIRES_S", 1.0)
    client, _ = tracker._connection.get()
    client.create_registered_model("left")
    client.set_registered_model_tag("left", TAG, "another")
    with claimed(client, "left", TAG):
        assert client.get_registered_model("left").tags[TAG] != "another"
    assert TAG not in client.get_registered_model("left").tags


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["taken", "late"])
def test_a_lost_claim_is_told_before_a_change(
    tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr(mlflow_claim, "_SETTLE_S", 0.5)
    client, _ = tracker._connection.get()
    client.create_registered_model(loss)
    with claimed(client, loss, TAG, locked=True) as check:
        check()
        if loss == "taken":
            client.set_registered_model_tag(loss, TAG, "another")
        else:
            monkeypatch.setattr(mlflow_claim, "_EXPIRES_S", 0.0)
        with pytest.raises(OperationalError, match="tried again"):
            check()
    # What another one has taken is not given up.
    assert client.get_registered_model(loss).tags.get(TAG) == ("another" if loss == "taken" else None)
