"""The config parameters of a flow: a YAML file with typed overrides, resolved into one RunConfig.

Prefect's API checks a deployment's parameters against the schema of `Overrides`, so a misspelt key is refused before a
flow run exists. The command line resolves its overrides itself and passes the RunConfig.
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
    create_model,
    model_serializer,
)
from pydantic.json_schema import SkipJsonSchema

from base import storage
from base.config import Section, dump, validate
from base.errors import ConfigError, directory_fault
from base.yaml_config import merge, read_yaml
from tasks.run_config import RunConfig


class _GivenKeys(BaseModel):
    """Base of the models of overrides. Only keys that were set are serialized: a null would win over the file."""

    model_config = ConfigDict(extra="forbid")

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


def _partial(section: type[Section]) -> type[BaseModel]:
    """A model of `section` in which every key is optional, at every depth; unknown keys stay forbidden."""
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


NO_OVERRIDES = Overrides()
DEFAULT_CONFIG = "configs/tiny.yaml"
ConfigParameter = str | SkipJsonSchema[RunConfig]
"""A flow's `config`: the path of a YAML file. Callers in the same process may pass a resolved config; the API's schema
does not offer that."""


def resolve(
    config: str | RunConfig | Mapping[str, Any], overrides: BaseModel | Mapping[str, Any] = NO_OVERRIDES
) -> RunConfig:
    """The validated configuration of a run: a config with overrides merged into it.

    Args:
        config: path of a YAML file, a resolved config, or its values as Prefect's API keeps them.
        overrides: some keys of a RunConfig, nested; they win over `config`.

    Raises:
        MissingFileError: no such file.
        ConfigError: lists every broken rule.
    """
    changes = overrides.model_dump(mode="json", exclude_unset=True) if isinstance(overrides, BaseModel) else overrides
    if isinstance(config, RunConfig):
        if not changes:
            return config
        config = config.model_dump(mode="json", exclude_unset=True)
    raw, origin = (read_yaml(config), config) if isinstance(config, str) else (config, "the flow's config")
    return validate(merge(raw, changes, origin=origin), RunConfig, origin=origin)


def dated(config: RunConfig, day: date) -> RunConfig:
    """The config with the day added to the run's name, so that each retraining has a run directory of its own.

    Raises:
        ConfigError: the name is too long with the day.
    """
    return resolve(config, {"name": f"{config.name}-{day:%Y%m%d}"})


def run_directory(config: RunConfig) -> str:
    """Path of the run directory, <runs_directory>/<name>.

    Raises:
        ConfigError: it is not on a file system, as tasks and the trainer share it as files; or a file is in its place.
    """
    directory = storage.join(config.runs_directory, config.name)
    if not storage.is_local(directory):
        raise ConfigError(
            f"runs_directory: must be a local or shared file system (got {config.runs_directory}); "
            "put large state on object storage by checkpoint.directory"
        )
    path = storage.local_path(directory)
    if fault := directory_fault(path):
        raise ConfigError(f"runs_directory {config.runs_directory}: {fault}. Give another directory.")
    return path


def write_resolved(config: RunConfig) -> str:
    """Write config.yaml into the run directory, and return the directory's path."""
    directory = run_directory(config)
    storage.write_bytes(storage.join(directory, "config.yaml"), dump(config).encode())
    return directory
