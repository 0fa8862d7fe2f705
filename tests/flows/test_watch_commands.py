"""The options of `cherry logs` and `cherry top`."""

from base.errors import MissingFileError
from base.json_lines import append_line
from tasks.records.events import log_file


def test_logs_prints_the_last_lines(make_run, capsys, code):
    run = make_run("tiny").directory
    for number in range(3):
        append_line(log_file(run, "data"), f"data line {number}")
        append_line(run / "train" / "rank-1.log", f"rank line {number}")
    runs = str(run.parent)
    assert code("logs", "tiny", "--step", "data", "--lines", "1", "--runs-directory", runs) == 0
    assert capsys.readouterr().out == "data line 2\n"
    assert code("logs", "tiny", "--rank", "1", "--lines", "2", "--runs-directory", runs) == 0
    assert capsys.readouterr().out == "rank line 1\nrank line 2\n"
    assert code("logs", "tinny", "--runs-directory", runs) == MissingFileError.exit_code
    assert "Did you mean tiny?" in capsys.readouterr().err
