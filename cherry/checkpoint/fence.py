"""Fencing of a run directory: of two attempts that write to it, only the newer may commit.

Each attempt takes the next epoch number when it starts. Two schedulers may start the same run twice.
"""

from __future__ import annotations

import os
import re

from base import storage
from base.errors import SupersededError, storage_errors

_EPOCH = re.compile(r"^epoch-(\d{6})$")


class Fence:
    """One attempt's epoch in a run directory.

    Args:
        directory: local directory that all attempts share.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.epoch = self._take()

    def check(self) -> None:
        """Check that this is still the newest attempt.

        Raises:
            SupersededError: a newer attempt has started; this one must stop writing.
        """
        newest = _newest(self.directory)
        if newest != self.epoch:
            raise SupersededError(
                f"{self.directory}: attempt {newest} took over from attempt {self.epoch}, which stops here. "
                "Nothing is lost: the newer attempt resumes from the newest committed checkpoint."
            )

    def _take(self) -> int:
        path = storage.local_path(self.directory)
        with storage_errors(self.directory):
            os.makedirs(path, exist_ok=True)
            while True:
                epoch = _newest(self.directory) + 1
                try:
                    # exclusive: of two attempts that start together, only one creates the file
                    os.close(os.open(f"{path}/epoch-{epoch:06d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                except FileExistsError:
                    continue
                return epoch


def _newest(directory: str) -> int:
    return max((int(m[1]) for name in storage.list_names(directory) if (m := _EPOCH.match(name))), default=0)
