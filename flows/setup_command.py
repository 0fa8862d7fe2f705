"""`cherry setup`: the work pool, the deployments and the automations of this project on a Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings

from base.errors import ConfigError, MissingFileError, OperationalError, without_credentials
from flows.notifications import read_addresses, set_up_notifications
from flows.prefect_server import check_address
from tasks.processes.programs import module_command, module_environment
from tasks.records.run_names import name_scheduled

POOL = "cherry"
AUTOMATIONS = "automations.yaml"
_RETRAINING = "retrain-flow"
# A first start makes the database: about 20 s of two processors, and minutes where other programs have most of them.
_STARTING_S = 600.0
_ANSWER_S = 60.0
# The server makes a schedule's runs within some seconds, unless its scheduler is off.
_SCHEDULING_S = 20.0


def set_up(directory: Path, notify_file: Path | None = None) -> list[str]:
    """What was set up, one line each. Repeating it changes nothing; what it made before is replaced.

    Args:
        directory: the checkout, with prefect.yaml and automations.yaml.
        notify_file: addresses of notifications; `None` leaves those that are there.

    Raises:
        ConfigError: no server is named, or its address, or one of the file's, is none.
        MissingFileError: `directory` is no checkout, or there is no file of addresses.
        OperationalError: the server does not answer, or refuses.
    """
    for name in ("prefect.yaml", AUTOMATIONS):
        if not (directory / name).exists():
            raise MissingFileError(f"no {name} in {directory.absolute()}. Run `cherry setup` in a checkout of Cherry.")
    url = get_current_settings().api.url
    if url is None:
        raise ConfigError(
            "PREFECT_API_URL is not set, so there is no Prefect server to set up. Start one (prefect --no-prompt "
            "server start) and set it: export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    check_address(url)
    addresses = None if notify_file is None else read_addresses(notify_file)
    _wait_for(url)
    try:
        done = [_pool(), *_automations(directory / AUTOMATIONS)]
        if addresses is not None:
            done += set_up_notifications(addresses, directory / AUTOMATIONS)
    except (httpx.HTTPError, RuntimeError) as error:
        raise OperationalError(
            f"Prefect's server at {without_credentials(url)} does not answer as it should ({error}). Start it, or "
            "correct PREFECT_API_URL."
        ) from error
    return [*done, _deployments(directory), *_schedules(directory)]


def _wait_for(url: str) -> None:
    """Wait for a server that was started a moment ago; what keeps it from answering is for the calls that follow."""
    end, waiting = time.monotonic() + _STARTING_S, False
    with httpx.Client(timeout=_ANSWER_S) as client:
        while time.monotonic() < end:
            try:
                client.get(f"{url}/health")
                return
            except httpx.ConnectError:
                if not waiting:
                    shown = without_credentials(url)
                    note = f"waiting for Prefect's server at {shown} (Ctrl-C if none is starting there)"
                    print(note, file=sys.stderr, flush=True)
                waiting = True
                time.sleep(0.5)
            except httpx.HTTPError:
                return


def _pool() -> str:
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        except ObjectAlreadyExists:
            return f"work pool {POOL}: is there"
    return f"work pool {POOL}: made"


def _automations(file: Path) -> list[str]:
    done = []
    with get_client(sync_client=True) as client:
        for values in yaml.safe_load(file.read_text())["automations"]:
            wanted = AutomationCore.model_validate(values)
            found = client.read_automations_by_name(wanted.name)
            if found:
                client.update_automation(found[0].id, wanted)
            else:
                client.create_automation(wanted)
            for surplus in found[1:]:
                client.delete_automation(surplus.id)
            done.append(f"automation {wanted.name}: {'brought up to date' if found else 'made'}")
    return done


def _deployments(directory: Path) -> str:
    command = module_command("prefect", ["--no-prompt", "deploy", "--all"])
    environment = {**module_environment(), "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "WARNING")}
    ended = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        output = ended.stdout + ended.stderr
        raise OperationalError(f"prefect deploy --all ended with code {ended.returncode}:\n{output}")
    names = [one["name"] for one in yaml.safe_load((directory / "prefect.yaml").read_text())["deployments"]]
    return f"deployments: {', '.join(names)}"


def _schedules(directory: Path) -> list[str]:
    """What is scheduled. The retrainings that the server makes ahead of time get names, as each run does later."""
    done = []
    with get_client(sync_client=True) as client:
        for one in yaml.safe_load((directory / "prefect.yaml").read_text())["deployments"]:
            flow = one["entrypoint"].rpartition(":")[2].replace("_", "-")
            if not one.get("schedules"):
                continue
            if flow != _RETRAINING:
                done.append(f"schedule of {one['name']}: {one['schedules'][0]['cron']}")
                continue
            deployment = client.read_deployment_by_name(f"{flow}/{one['name']}")
            end = time.monotonic() + _SCHEDULING_S
            while not (names := name_scheduled(client, deployment.id)) and time.monotonic() < end:
                time.sleep(0.5)
            done.append(
                f"schedule of {one['name']}: next is {names[0]}" if names else f"schedule of {one['name']}: set"
            )
    return done
