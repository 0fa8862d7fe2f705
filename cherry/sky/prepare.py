"""`python -m cherry.sky.prepare`: data of a job whose hosts share no file system, prepared on another machine."""

from __future__ import annotations

from base import storage
from base.config import load
from base.errors import ArgumentParser, run_program
from cherry.checkpoint import resume_rules as rules
from cherry.job_config import JobConfig
from cherry.rank_main import prepared


def main() -> None:
    """Entry point of `python -m cherry.sky.prepare`."""
    parser = ArgumentParser(prog="python -m cherry.sky.prepare", description=__doc__)
    parser.add_argument("--config", required=True, help="a config, or the name of a packaged one, like tiny")
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="any key of the config, dotted")
    options = parser.parse_args()
    config = load(options.config, JobConfig, options.set, part_of_file=True)
    prepared(config, options.run_dir)
    rules.write_config(config, options.run_dir, options.config)
    print(f"{storage.join(options.run_dir, 'data')} holds the data of {config.name}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
