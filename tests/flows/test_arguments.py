"""Words of the command line: keys of the config written as options, and what a shell completes."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from flows.arguments import WithOverrides, complete_config, complete_run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train.steps", "5"], "train.steps=5"),
        (["--train.steps=5"], "train.steps=5"),
        (["--name=b"], "name=b"),
        (["--train.steps"], "train.steps=VALUE"),
        (["--quickly"], None),
    ],
)
def test_a_key_that_is_written_as_an_option_is_explained(words: list[str], told: str | None) -> None:
    command = WithOverrides("run", params=[click.Argument(["overrides"], nargs=-1)])
    with pytest.raises(click.UsageError) as refused:
        command.make_context("run", words)
    assert (f"no dashes: {told}" in refused.value.format_message()) == (told is not None)


def test_configs_and_runs_are_completed(tmp_path: Path) -> None:
    context = click.Context(click.Command("run"))
    names = [item.value for item in complete_config(context, click.Argument(["config"]), "ti")]
    assert names == ["tiny", "ti"]  # the last one asks the shell for files
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    context.params["runs_directory"] = tmp_path
    assert [item.value for item in complete_run(context, click.Argument(["name"]), "mi")] == ["mine"]
