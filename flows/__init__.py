"""Prefect flows, which order the steps and set the retry policy, and the `cherry` command that starts them."""
