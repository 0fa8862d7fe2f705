"""Measures expert load balance on a skewed corpus: max over mean expert load, with and without the router bias.

    python -m benchmarks.load_balance [--steps N] [--rate R] [--output FILE]

The corpus is generated: words by Zipf's law in a few fixed phrases, so that few distinct tokens make up most of it and
an untrained router sends them to few experts. A small model of the `tiny` architecture trains on it twice, through
the trainer, with everything equal but `train.expert_bias_update_rate`. One JSON row each; `load` is the worst layer's
max over mean load (8 experts, 2 a token: 4.0 is the most there can be), a mean over the last tenth of the steps.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

from base.config import validate
from cherry.data.prepare import prepare
from cherry.job_config import JobConfig
from cherry.trainer import Trainer

WORDS, PHRASES, DOCUMENTS = 400, 60, 400
MODEL = {
    "preset": "tiny",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "q_lora_rank": 32,
    "initializer_range": 0.05,
}


def write_corpus(folder: Path, seed: int = 0) -> None:
    """Write documents of phrases drawn by Zipf's law, whose words are too."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(WORDS)]
    phrases = [" ".join(_zipf(draw, words, draw.randint(4, 12))) for _ in range(PHRASES)]
    for number in range(DOCUMENTS):
        lines = [". ".join(_zipf(draw, phrases, 4)) for _ in range(12)]
        (folder / f"{number:04d}.txt").write_text("\n".join(lines))


def _zipf(draw: random.Random, items: list[str], count: int) -> list[str]:
    return draw.choices(items, weights=[1 / (rank + 1) for rank in range(len(items))], k=count)


def job(corpus: str, steps: int, rate: float) -> JobConfig:
    raw = {
        "name": "load-balance",
        "model": MODEL,
        "data": {"source": corpus, "sequence_length": 64, "heldout_fraction": 0.05},
        "train": {
            "steps": steps,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "expert_bias_update_rate": rate,
            "heldout_sequences": 8,
        },
        "checkpoint": {"every_steps": steps},
    }
    return validate(raw, JobConfig, origin="benchmark")


def measure(config: JobConfig, folder: Path) -> dict:
    model = config.model
    directory = str(folder / "data")
    prepare(config.data, vocab_size=model.vocab_size, directory=directory)
    result = Trainer(config, str(folder)).run()
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    loads = [line["expert_load_max_over_mean"] for line in lines]
    last = loads[-max(1, len(loads) // 10) :]
    return {
        "what": "expert load",
        "bias_update_rate": config.train.expert_bias_update_rate,
        "steps": config.train.steps,
        "load_first": round(loads[0], 3),
        "load": round(sum(last) / len(last), 3),
        "load_least": round(min(last), 3),
        "load_most": round(max(last), 3),
        "steps_to_1.3": next((line["step"] for line in lines if line["expert_load_max_over_mean"] < 1.3), None),
        "heldout_loss": round(result["heldout_loss"], 4),
        "seconds": round(result["seconds"], 1),
        "device": f"CPU, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--rate", type=float, default=5e-3, help="of the run with the bias update on")
    parser.add_argument("--output")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    command = " ".join(["python -m benchmarks.load_balance", *sys.argv[1:]])
    rows = []
    with tempfile.TemporaryDirectory() as root:
        corpus = Path(root, "corpus")
        corpus.mkdir()
        write_corpus(corpus)
        for rate in (0.0, options.rate):
            folder = Path(root, f"rate-{rate}")
            folder.mkdir()
            rows.append({**measure(job(str(corpus), options.steps, rate), folder), "command": command})
    dist.destroy_process_group()
    for row in rows:
        print(json.dumps(row))
    if options.output:
        with open(options.output, "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
