"""Prefect and MLflow as a team runs them, on one machine: PostgreSQL, an S3 store, both servers with a password."""
