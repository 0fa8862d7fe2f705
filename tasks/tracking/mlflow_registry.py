"""MLflow's model registry: versions of weights by reference, found again by identity, and aliases with history."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

from tasks.tracking.mlflow_claim import claimed
from tasks.tracking.mlflow_connection import MlflowConnection
from tasks.tracking.mlflow_database import alone
from tasks.tracking.outages import registry_call
from tasks.tracking.protocol import ModelVersion

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

_MODEL_URI = "models:/"


class MlflowRegistry:
    """`ModelRegistry` over MLflow."""

    def __init__(self, connection: MlflowConnection) -> None:
        self._connection = connection

    @registry_call
    def register(
        self, run_id: str | None, name: str, uri: str, *, identity: str, alias: str, tags: Mapping[str, str]
    ) -> ModelVersion:
        """See `ModelRegistry`."""
        number = self._find_version(name, identity) or self._create_version(run_id, name, uri, identity)
        self.annotate(ModelVersion(name, number, uri), tags=tags)
        self.set_alias(name, alias, number)
        found = self.version(name, number=number)
        assert found is not None
        return found

    def _find_version(self, name: str, identity: str) -> int | None:
        client, _ = self._connection.get()
        found = client.search_model_versions(f"name = '{name}' and tags.`cherry.identity` = '{identity}'")
        return max((int(version.version) for version in found), default=None)

    def _create_version(self, run_id: str | None, name: str, uri: str, identity: str) -> int:
        import mlflow
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

        client, experiment = self._connection.get()
        self._connection.use_for_process()
        model = mlflow.create_external_model(
            name=name, source_run_id=run_id, tags={"uri": uri}, model_type="LLM", experiment_id=experiment
        )
        # What mlflow.register_model does, without its lines on the terminal.
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        source = _MODEL_URI + model.model_id
        tags = {"uri": uri, "cherry.identity": identity}
        made = client.create_model_version(name, source, tags=tags, model_id=model.model_id)
        shown = json.dumps([{"name": name, "version": made.version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": shown})
        return int(made.version)

    @registry_call
    def set_alias(self, name: str, alias: str, version: int, *, replacing: int | Literal["any"] | None = "any") -> bool:
        """See `ModelRegistry`. MLflow keeps no history of an alias, so the version before it is tagged first."""
        client, _ = self._connection.get()  # first: connecting takes the same lock
        if replacing == "any":
            self._tag_previous(client, name, alias, version)
            client.set_registered_model_alias(name, alias, str(version))
            return True
        with self._alone(client, name, alias) as check:
            if self._number(name, alias) not in (replacing, version):
                return False
            self._tag_previous(client, name, alias, version)
            check()
            client.set_registered_model_alias(name, alias, str(version))
            return True

    def _number(self, name: str, alias: str) -> int | None:
        found = self.version(name, alias=alias)
        return None if found is None else found.version

    def _tag_previous(self, client: MlflowClient, name: str, alias: str, version: int) -> None:
        before = self._number(name, alias)
        if before not in (None, version):
            client.set_model_version_tag(name, str(version), f"previous_{alias}", str(before))

    @contextmanager
    def _alone(self, client: MlflowClient, name: str, alias: str) -> Iterator[Callable[[], None]]:
        """Hold what one process at a time has of an alias; yields the check of it that belongs before a change.

        A database's file has a lock. A server may work on the same file, so the claim is held there too.
        """
        file, tag = self._connection.registry_file, f"cherry.claim.{alias}"
        with (
            nullcontext() if file is None else alone(file),
            claimed(client, name, tag, locked=file is not None) as check,
        ):
            yield check

    @registry_call
    def version(self, name: str, *, alias: str | None = None, number: int | None = None) -> ModelVersion | None:
        """See `ModelRegistry`."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

        absent = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}
        try:
            client, _ = self._connection.get()
            if number is not None:
                found = client.get_model_version(name, str(number))
            else:
                found = client.get_model_version_by_alias(name, alias or "")
        except MlflowException as error:
            if error.error_code in absent:
                return None
            raise
        return _version(found)

    @registry_call
    def versions(self) -> list[ModelVersion]:
        """See `ModelRegistry`."""
        client, _ = self._connection.get()
        found: list[ModelVersion] = []
        page = client.search_model_versions()
        while True:
            found += [_version(version) for version in page]
            if not page.token:
                return found
            page = client.search_model_versions(page_token=page.token)

    @registry_call
    def annotate(
        self,
        version: ModelVersion,
        *,
        tags: Mapping[str, str] | None = None,
        card: str | None = None,
        model_card: str | None = None,
    ) -> None:
        """See `ModelRegistry`."""
        client, _ = self._connection.get()
        for key, value in (tags or {}).items():
            client.set_model_version_tag(version.name, str(version.version), key, value)
        if card is not None:
            client.update_model_version(version.name, str(version.version), description=card)
        if model_card is not None:
            client.update_registered_model(version.name, description=model_card)


def _version(found: MlflowVersion) -> ModelVersion:
    tags, source = dict(found.tags), str(found.source)
    model_id = source.removeprefix(_MODEL_URI) if source.startswith(_MODEL_URI) else None
    return ModelVersion(str(found.name), int(found.version), tags.get("uri", source), tags, model_id)
