"""A worker process: quantizes the shards that it is given, a JSON line each on standard input.

It answers on what was its standard output, in JSON lines: `read` (bytes since the last line), `done` (a shard's
record), `error` (an error's record, after which it ends). It ends when its input does, at once: whoever started it is
gone, and another may write the same folder.

    python -m model.quantization.worker SOURCE TARGET FORMAT THREADS [CALIBRATION'S WORK DIRECTORY]
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import torch

from base.errors import CherryError, error_record
from model.numerics.formats import QuantizationFormat, find_format
from model.quantization.calibrated import CalibratedFormat
from model.quantization.shard import quantize_shard
from model.weights.pretrained import read_model_config
from model.weights.reader import WeightsReader


def main() -> None:
    """Quantize shards until the input ends."""
    source, target, format_name, threads, *calibration = sys.argv[1:]
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    torch.set_num_threads(int(threads))
    try:
        reader = WeightsReader(source)
        quantization: QuantizationFormat = find_format(format_name).load(read_model_config(source)[0])
        for directory in calibration:
            quantization = CalibratedFormat(quantization, Path(directory))
        while True:
            job = jobs.get()
            record = quantize_shard(
                reader,
                target,
                quantization,
                job["file"],
                job["groups"],
                lambda count: _answer(answers, {"read": count}),
            )
            _answer(answers, {"done": record})
    except CherryError as error:
        _answer(answers, {"error": error_record(error)})


def _listen(jobs: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)


def _answer(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
