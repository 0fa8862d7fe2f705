"""What a real driver tells of its GPUs."""

from __future__ import annotations

import pytest

from cherry.planner.local_device import local_gpus
from cherry.remote.gpus import collect_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not local_gpus(), reason="no GPU")]


def test_the_driver_tells_of_every_gpu():
    pytest.importorskip("pynvml")
    driver, gpus = collect_gpus()
    assert driver is not None and driver[0].isdigit()
    assert gpus is not None and [gpu.index for gpu in gpus] == list(range(len(local_gpus())))
    for gpu in gpus:
        assert 0 <= gpu.used_bytes < gpu.memory_bytes
        assert list(gpu.faults()) == []
