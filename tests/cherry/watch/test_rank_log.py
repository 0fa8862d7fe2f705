"""The log of a rank: what it prints is in it too, also the traceback of a bug, and its stacks on SIGUSR1."""

from __future__ import annotations

import re
import subprocess
import sys

PROGRAM = """
import logging, os, signal, sys
from cherry.watch.rank_log import log_to_file
log_to_file(sys.argv[1], 3, prints=True)
logging.getLogger("cherry").info("a record")
print("half ", end="")
print("a line")
print("a warning", file=sys.stderr)
os.kill(os.getpid(), signal.SIGUSR1)
raise RuntimeError("a bug")
"""


def test_what_a_rank_prints_is_in_its_log_and_where_it_went_before(tmp_path):
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.stdout == "half a line\n"
    assert ended.stderr.startswith("a warning\n")
    log = (tmp_path / "train" / "rank-3.log").read_text()
    words = [" INFO cherry: a record", " INFO stdout: half a line", " INFO stderr: a warning"]
    assert [re.sub(r"^\S+ \S+", "", line) for line in log.splitlines()[1:4]] == words
    assert re.search(r" INFO cherry: rank 3 on \S+, pid \d+$", log.splitlines()[0])
    assert "RuntimeError: a bug" in log
    assert "most recent call first" in log
