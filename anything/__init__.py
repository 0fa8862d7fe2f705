"""Serving: the engine, its scheduler, the gateway in front of it, the client, and A/B statistics."""
