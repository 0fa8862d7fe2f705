"""Fencing of a run: of two attempts that write to its directories, only the newer may commit.

Each attempt takes the next epoch number when it starts, by a file that only one process can create: schedulers may
start the same run twice, and a host that was given up may come back. On an object store the file is a conditional put,
so that hosts that share nothing else exclude each other too.
"""

from __future__ import annotations

import re

from base import storage
from base.errors import SupersededError
from base.exclusive import create

_EPOCH = re.compile(r"^epoch-(\d{6})$")


class Fence:
    """One attempt's epoch in the directories that it writes to.

    The epoch is above all that any of them holds, and the same in each: of attempts that have some directory in common,
    the one with the highest epoch goes on, and no two stop each other.

    Args:
        directories: paths or URIs, in the same order in every attempt. Call it on one rank only.

    Raises:
        ConfigError: a directory is in storage without a conditional put.
    """

    def __init__(self, *directories: str) -> None:
        self.directories = directories
        self.epoch = self._take()

    def check(self) -> None:
        """Check that this is still the newest attempt.

        Raises:
            SupersededError: a newer attempt has started, or the directory is another one; this one must stop writing.
        """
        for directory in self.directories:
            newest = _newest(directory)
            if newest < self.epoch:
                raise SupersededError(
                    f"{directory} is not the directory that this attempt began in: it was moved or removed since. Put "
                    "it back, in place of what was written here, and start the same command again."
                )
            if newest > self.epoch:
                raise SupersededError(
                    f"{directory}: attempt {newest} took over from attempt {self.epoch}, which stops here. "
                    "Nothing is lost: the newer attempt resumes from the newest committed checkpoint."
                )

    def _take(self) -> int:
        for directory in self.directories:
            storage.make_directory(directory)
        while True:
            epoch = max(map(_newest, self.directories)) + 1
            # of attempts that start together, only one creates the file
            if all(create(storage.join(directory, f"epoch-{epoch:06d}")) for directory in self.directories):
                return epoch


def _newest(directory: str) -> int:
    return max((int(m[1]) for name in storage.list_names(directory) if (m := _EPOCH.match(name))), default=0)
