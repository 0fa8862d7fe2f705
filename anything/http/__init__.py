"""The HTTP API: application, request lifetime, server-sent events, API keys, metrics, server process."""
