"""Serving: the engine, its scheduler, the gateway in front of it, the client, and A/B statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anything.client import Client as Client
    from anything.client import infer as infer

__all__ = ["Client", "infer"]


def __getattr__(name: str) -> Any:
    # On first use: importing the package must stay cheap for whoever needs one small module of it.
    if name in __all__:
        from anything import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
