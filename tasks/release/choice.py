"""Which registered version a release serves: a named one, or the run's own unless a better one would be replaced."""

from __future__ import annotations

from dataclasses import dataclass

from base import storage
from base.errors import ConfigError, MissingFileError
from tasks.files.outputs import find_output
from tasks.processes.replicas import ServingDirectory
from tasks.run_config import SERVING_ALIAS
from tasks.steps import RunContext, find_finished
from tasks.tracking.protocol import ModelVersion


@dataclass(frozen=True)
class Release:
    """Registered version to serve, and the folder of its weights."""

    name: str
    version: int
    model_path: str
    named: bool = True
    """Whether a person named the version; it then may replace a better one."""
    story: str = ""
    """Its name and verdict."""
    replaces: str = ""
    """The other versions that answer requests now, with their verdicts; empty when there are none."""
    run_id: str | None = None
    """Id of the release's run in the tracker."""

    @property
    def label(self) -> str:
        """Label of the version in answers."""
        return f"{self.name}-v{self.version}"


def choose(context: RunContext, number: int | None, alias: str | None = None) -> Release:
    """Release of the version with this number or alias, or of the run's own when neither is given.

    Raises:
        MissingFileError: no such version, or its weights are gone.
        ConfigError: the quantized weights may cost more than quantize.max_dnll, so they are not served; or nobody named
            the version and a better one would be replaced, see `check_not_worse`.
    """
    named = number is not None or alias is not None
    found = registered(context, number, alias) if named else _own(context)
    champion, served = _champion(context), _served(context)
    if not named:
        check_not_worse(found, champion, served)
    return Release(
        found.name,
        found.version,
        _weights(context, found),
        named,
        story=_story(found, champion),
        replaces=", ".join(
            _story(served, champion) if served is not None and label == _label_of(served) else label
            for label in _labels_served(context)
            if label != _label_of(found)
        ),
    )


def check_still(context: RunContext, release: Release) -> None:
    """Check again what `choose` checked, for registry and traffic may have changed while the replica was started."""
    if not release.named:
        check_not_worse(registered(context, release.version), _champion(context), _served(context))


def registered(context: RunContext, number: int | None, alias: str | None = None) -> ModelVersion:
    """The version with this number, or with the alias when it is `None`.

    Raises:
        MissingFileError: there is none.
    """
    config = context.config.register_model
    tracker = context.tracker()
    if number is not None:
        found = tracker.registry.version(config.model_name, number=number)
    else:
        found = tracker.registry.version(config.model_name, alias=alias)
    if found is None:
        wanted = f"version {number}" if number is not None else f"version with the alias {alias!r}"
        raise MissingFileError(
            f"{config.model_name} has no {wanted} in the registry at {tracker.address}. "
            "Run the training flow first, or name a version that exists."
        )
    return found


def check_not_worse(found: ModelVersion, champion: ModelVersion | None, served: ModelVersion | None) -> None:
    """Check that a version which nobody named does not replace one that is better, as far as comparisons tell.

    Args:
        champion: the champion now, not when `found` was compared with it.
        served: the version that answers requests now.

    Raises:
        ConfigError: it was judged worse, the champion is another one than it was compared with, or, without a champion,
            a newer one is served.
    """
    if champion is not None and champion.version == found.version:
        return
    compared_with, again = found.tags.get("compared_with"), ""
    if found.tags.get("verdict") == "worse":
        why = f"{found.name} version {found.version} was judged worse than {compared_with}"
    elif champion is not None and compared_with != champion.title:
        why = (
            f"the champion is {_story(champion)}. This is version {found.version}, which was compared with "
            f"{compared_with}"
        )
        again = " Run it again to compare it with the champion, or name a version:"
    elif champion is None and served is not None and served.version > found.version:
        why = f"{_story(served)}, is served, and is newer than version {found.version}"
    else:
        return
    best = f"--model-version {champion.version} serves the champion, " if champion is not None else ""
    raise ConfigError(f"{why}.{again} {best}--model-version {found.version} serves this one all the same.")


def _own(context: RunContext) -> ModelVersion:
    """The version that this run registered, or the candidate when it registered none.

    Raises:
        ConfigError: this registry does not have the run's version.
    """
    config = context.config.register_model
    record = find_finished(context.path, "register")
    own = storage.read_json(record.outputs["register"]) if record is not None else {}
    if own.get("name") != config.model_name:
        return registered(context, None, config.candidate_alias)
    found = registered(context, own["version"])
    if own.get("identity") not in (None, found.tags.get("cherry.identity")):
        raise ConfigError(
            f"{found.name} version {found.version} in the registry at {context.tracker().address} is not the one that "
            f"run {context.config.name} registered. Track where it was trained (tracking.uri), or name a version."
        )
    return found


def _champion(context: RunContext) -> ModelVersion | None:
    config = context.config.register_model
    return context.tracker().registry.version(config.model_name, alias=config.champion_alias)


def _served(context: RunContext) -> ModelVersion | None:
    """The version of this model that the last release serves, while a replica of it has traffic."""
    found = context.tracker().registry.version(context.config.register_model.model_name, alias=SERVING_ALIAS)
    if found is None:
        return None
    return found if _label_of(found) in _labels_served(context) else None


def _labels_served(context: RunContext) -> list[str]:
    """Labels of the versions, of any model, that have traffic now."""
    serving = ServingDirectory(context.config.runs_directory)
    shares = serving.weights()
    return sorted({server.version for server in serving.servers() if shares.get(server.name, 0.0) > 0})


def _label_of(version: ModelVersion) -> str:
    return Release(version.name, version.version, version.uri).label


def _story(version: ModelVersion, champion: ModelVersion | None = None) -> str:
    """A version and its verdict, like `m v2, the champion, judged better than m v1: the candidate's loss is ...`."""
    text = version.title
    if champion is not None and champion.version == version.version:
        text += ", the champion"
    verdict, reason = version.tags.get("verdict"), version.tags.get("reason", "").rstrip(".")
    if verdict is None:
        return text
    judged = "not told apart from" if verdict == "can't tell" else f"judged {verdict} than"
    return f"{text}, {judged} {version.tags.get('compared_with')}" + (f": {reason}" if reason else "")


def _weights(context: RunContext, found: ModelVersion) -> str:
    """Folder of a version's weights, as deploy.artifact chooses them."""
    runs = context.config.runs_directory
    if context.config.deploy.artifact == "quantized":
        if found.tags.get("quantized_passed") == "false":
            raise ConfigError(
                f"{found.name} version {found.version}: its quantized weights did not pass: "
                f"{found.tags.get('quantized_reason', 'they cost more than quantize.max_dnll')}. Deploy the export "
                "(deploy.artifact=export), or raise the limit and run the training flow again."
            )
        path = find_output(found.tags["quantized_uri"], found.tags.get("quantize_fingerprint", ""), runs)
    else:
        path = find_output(found.uri, found.tags.get("export_fingerprint", ""), runs)
    if damage := storage.damage(path):
        raise MissingFileError(
            f"{found.name} version {found.version}: its weights are no longer at {path} ({damage}). "
            f"`cherry run` with the config of {found.tags.get('run', 'its run')} makes them again."
        )
    return path
