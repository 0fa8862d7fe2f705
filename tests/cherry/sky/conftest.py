"""Documents of a job whose data is prepared on this machine."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def text(prepared_data, tmp_path):
    """Override of the documents' folder: that of the session's has the prepared data inside."""
    folder = tmp_path / "text"
    folder.mkdir()
    for file in prepared_data.parent.glob("*.txt"):
        shutil.copy(file, folder)
    return f"data.source={folder}"
