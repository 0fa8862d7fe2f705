"""Runs as their directories tell of them: status, logs, comparison, removal. No server is asked for it."""
