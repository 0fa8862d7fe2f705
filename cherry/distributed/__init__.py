"""Parallelism: the device mesh, FSDP2, expert and context parallelism, compressed gradient reduction."""
