"""Owns how a flow's typed parameters become the resolved configuration of a run.

It knows nothing of the steps. A misspelt key is refused by Prefect's API, from the schema, before a run exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
)

from base import storage
from base.config import Section, apply_overrides, dump, read_yaml, validate
from base.errors import ConfigError
from tasks.run_config import RunConfig


class _GivenKeys(BaseModel):
    """Only what was given is written: Prefect's page and API then hold no nulls that would win over the file."""

    model_config = ConfigDict(extra="forbid")

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


def _partial(section: type[Section]) -> type[BaseModel]:
    """`section` with every key optional, at every depth; unknown keys stay forbidden, and descriptions stay."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            annotation = _partial(annotation)
        elif field.metadata:
            annotation = Annotated[(annotation, *field.metadata)]
        fields[name] = (
            annotation | None,
            Field(default=None, description=field.description, json_schema_extra=_without_default),
        )
    return create_model(f"{section.__name__}Overrides", __base__=_GivenKeys, **fields)


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


Overrides: Any = _partial(RunConfig)
"""Any subset of RunConfig's keys, nested: `{"train": {"learning_rate": 2e-6}}`."""


def overrides_from(arguments: list[str]) -> Any:
    """`Overrides` from dotted `key=value` strings.

    Raises:
        ConfigError: an argument is not `key=value`, or names a key that does not exist.
    """
    try:
        return Overrides.model_validate(apply_overrides({}, arguments))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError("overrides:\n" + "\n".join(f"  {line}" for line in lines)) from error


def resolve(config: str, overrides: BaseModel | Mapping[str, Any]) -> RunConfig:
    """Read a config file, lay the overrides over it, and validate the whole.

    Raises:
        MissingFileError: no such file.
        ConfigError: lists every broken rule.
    """
    changes = overrides.model_dump(mode="json", exclude_unset=True) if isinstance(overrides, BaseModel) else overrides
    return validate(_merged(read_yaml(config), changes), RunConfig, origin=config)


def dated(config: str, overrides: BaseModel, day: date) -> Any:
    """Overrides that give a run the day in its name, so that each retraining has a directory of its own.

    Raises:
        MissingFileError, ConfigError: see `resolve`.
    """
    name = resolve(config, overrides).name
    return Overrides.model_validate({**overrides.model_dump(exclude_unset=True), "name": f"{name}-{day:%Y%m%d}"})


def _merged(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(raw)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = (
            _merged(old or {}, value) if isinstance(value, Mapping) and isinstance(old, dict | None) else value
        )
    return merged


def run_directory(config: RunConfig) -> str:
    """Where this run keeps everything.

    Raises:
        ConfigError: it would not be local; tasks and the trainer share it as files.
    """
    directory = storage.join(config.runs_directory, config.name)
    if not storage.is_local(directory):
        raise ConfigError(
            f"runs_directory: must be a local or shared file system (got {config.runs_directory}); "
            "put large state on object storage by checkpoint.directory"
        )
    return storage.local_path(directory)


def write_resolved(config: RunConfig) -> str:
    """Write config.yaml into the run directory; the directory's path."""
    directory = run_directory(config)
    storage.write_bytes(storage.join(directory, "config.yaml"), dump(config).encode())
    return directory
