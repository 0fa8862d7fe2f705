"""Runs that are interrupted: how far they came, and what Prefect's page says of it."""
