"""The steps of a run, one Prefect task a file. Only `tracking` imports mlflow."""
