"""Words of the `cherry` command: keys of the config written as options, and what a shell completes.

Nothing heavy is imported: every call of the command, and every press of Tab, reads this module.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from flows.runs.directories import run_directories

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Directory(click.ParamType):  # type: ignore[type-arg] # generic from click 8.4 on
    """An option's value that is a directory, or where one can be made."""

    name = "directory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; a usage error where a file is in its place, or no directory can have such a name."""
        from base.errors import directory_fault

        if _URI.match(str(value)):
            self.fail(f"{str(value)!a} is a URI, and a directory of a file system is needed.", param, ctx)
        path = Path(value)
        try:
            str(path).encode()
        except UnicodeEncodeError:
            self.fail(f"{str(path)!a} is not UTF-8, which records of a run are written in.", param, ctx)
        if fault := directory_fault(str(path)):
            self.fail(f"{fault}.", param, ctx)
        return path


class WithOverrides(click.Command):
    """A subcommand with key=value arguments; its error explains how to write keys that were given as options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remaining arguments, as click parses them; an unknown option's error explains KEY=VALUE."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            key = _as_override(error.option_name, given)
            if key is None:
                raise
            raise click.UsageError(f"{error.format_message()} Keys of the config have no dashes: {key}", ctx) from error


def _as_override(option: str, words: list[str]) -> str | None:
    """`key=value` for an option that is a key of the config; `None` for one that is none.

    A dotted name is a key; so is one that was written with its value, like `--name=b`.
    """
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != option.replace("_", "-"):
            continue
        if not equals and "." not in name:
            return None
        following = words[place + 1] if place + 1 < len(words) else "VALUE"
        return f"{name.lstrip('-')}={value if equals else following}"
    return None


def complete_config(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the packaged configs, and the shell's own completion of files."""
    from base.yaml_config import PACKAGED_CONFIGS

    names = sorted(path.stem for path in PACKAGED_CONFIGS.glob("*.yaml"))
    packaged = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return [*packaged, CompletionItem(incomplete, type="file")]


def complete_run(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the runs in the runs directory of this command line, newest first."""
    directory = ctx.params.get("runs_directory") or Path("runs")
    return [CompletionItem(path.name) for path in run_directories(Path(directory)) if path.name.startswith(incomplete)]


RUNS_DIRECTORY = click.option(
    "--runs-directory",
    type=Directory(),
    default=Path("runs"),
    show_default=True,
    metavar="DIR",
    help="Directory of the runs.",
    is_eager=True,  # the completion of a run's name looks into it
)
"""Option of the commands that read runs."""
RUN_NAME = click.argument("name", metavar="NAME", shell_complete=complete_run)
"""Argument of the commands that take one run."""
