"""Processes that tasks start: command lines, programs run to their end, servers of a deployment."""
