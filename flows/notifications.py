"""Notifications of failures and recoveries: Prefect blocks that hold the addresses, and automations that use them.

The addresses are secrets: they come from a file, and only Prefect's server keeps them, encrypted in its blocks.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any
from uuid import UUID

import apprise
import yaml
from prefect.blocks.notifications import SlackWebhook
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.types import SecretDict
from pydantic import SecretStr

from base.errors import ConfigError, storage_errors

_BLOCK_NAME = "cherry-notify-{}"
_OWN_BLOCK = re.compile(r"cherry-notify-\d+")
_MAX_BYTES = 1 << 16
# One text for all: what it is, its state by the event (it may have another by now), why, and where to look.
_TEXT = (
    'flow.name ~ " " ~ flow_run.name ~ ": " ~ event.payload.validated_state.name ~ ". " '
    '~ (event.payload.validated_state.message or "") ~ " " ~ (flow_run | ui_url or "")'
)
_SUBJECT = "{{ flow.name }} {{ flow_run.name }}: {{ event.payload.validated_state.name }}"


def read_addresses(file: Path) -> list[str]:
    """Addresses of a file, one a line; empty lines and those that begin with # are left out.

    Raises:
        MissingFileError, StorageError: there is no such file, or it cannot be read.
        ConfigError: a line is no address; the text names its number, and not the line, which is a secret.
    """
    with storage_errors(str(file)), file.open("rb") as handle:
        content = handle.read(_MAX_BYTES)
    try:
        lines = [line.strip() for line in content.decode().splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is no text in UTF-8. Give a file with an address a line.") from error
    logging.getLogger("apprise").disabled = True  # it would print an address that it does not know, with its secrets
    addresses = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        if not _is_webhook(line) and not apprise.Apprise().add(line):
            raise ConfigError(
                f"{file}: line {number} is neither a webhook (https://...) nor an address that Apprise knows, like "
                "mailtos://user:password@example.com?to=team@example.com. The others are at "
                "https://appriseit.com/services."
            )
        addresses.append(line)
    return addresses


def _is_webhook(address: str) -> bool:
    return re.fullmatch(r"https?://[^\s/]+\S*", address) is not None


def set_up_notifications(addresses: list[str], automations_file: Path) -> list[str]:
    """What was set up, one line each: the automations under `notifications` of a file, sending to these addresses.

    Without addresses they are removed. Repeating it changes nothing.
    """
    written = yaml.safe_load(automations_file.read_text())["notifications"]
    with get_client(sync_client=True) as client:
        actions = [_action(number, address) for number, address in enumerate(addresses, 1)]
        for values in written:
            found = client.read_automations_by_name(values["name"])
            if actions:
                wanted = AutomationCore.model_validate({**values, "actions": actions})
                if found:
                    client.update_automation(found[0].id, wanted)
                else:
                    client.create_automation(wanted)
            for surplus in found[1 if actions else 0 :]:
                client.delete_automation(surplus.id)
        _remove_blocks(client, {UUID(str(action["block_document_id"])) for action in actions})
    if not addresses:
        return ["notifications: none"]
    webhooks = sum(map(_is_webhook, addresses))
    return [f"notifications: to {webhooks} webhooks and {len(addresses) - webhooks} other addresses"]


def _action(number: int, address: str) -> dict[str, Any]:
    """The action of an automation that sends to an address, after writing the address into a block."""
    name, secret = _BLOCK_NAME.format(number), SecretStr(address)
    if _is_webhook(address):
        headers = SecretDict({"Content-Type": "application/json"})
        block = Webhook(url=secret, headers=headers).save(name, overwrite=True)
        # What Slack, Mattermost and those like them take.
        payload = f'{{"text": {{{{ ({_TEXT}) | tojson }}}}}}'
        return {"type": "call-webhook", "block_document_id": str(block), "payload": payload}
    # Of Prefect's own blocks, this is the one that passes any Apprise address on unchanged (prefect 3.8).
    block = SlackWebhook(url=secret).save(name, overwrite=True)
    texts = {"subject": _SUBJECT, "body": f"{{{{ {_TEXT} }}}}"}
    return {"type": "send-notification", "block_document_id": str(block), **texts}


def _remove_blocks(client: SyncPrefectClient, used: set[UUID]) -> None:
    """Remove the blocks of addresses that are no longer used."""
    for document in client.read_block_documents(include_secrets=False):
        if document.name is not None and _OWN_BLOCK.fullmatch(document.name) and document.id not in used:
            client.delete_block_document(document.id)
