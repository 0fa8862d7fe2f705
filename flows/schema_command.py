"""`cherry schema`: the JSON schema of a run's configuration, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from base.errors import storage_errors
from model.model_config import PRESETS
from tasks.run_config import RunConfig

SCHEMA_FILE = "schema.json"


def schema_text() -> str:
    """JSON schema of a config file, with the keys' descriptions, as indented JSON."""
    schema = RunConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for key in section.get("properties", {}).values():
            if "$ref" in key:
                key.pop("default", None)  # the section's own keys have their defaults
    _require_preset_or_sizes(schema["$defs"]["ModelConfig"])
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def _require_preset_or_sizes(model: dict[str, Any]) -> None:
    """A preset fills in every size, so the schema must not require them beside one."""
    model["properties"]["preset"]["anyOf"] = [{"enum": [*PRESETS]}, {"type": "null"}]
    model["anyOf"] = [{"required": ["preset"]}, {"required": model.pop("required")}]


def write_schema(directory: Path) -> Path:
    """Write schema.json into `directory`, and return its path.

    Raises:
        MissingFileError, StorageError: there is no such directory, or it cannot be written.
    """
    path = directory / SCHEMA_FILE
    with storage_errors(str(path)):
        path.write_text(schema_text(), encoding="utf-8")
    return path
