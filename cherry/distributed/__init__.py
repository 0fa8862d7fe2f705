"""Parallelism: device meshes, FSDP2 and HSDP (data parallel), expert and context parallel, compressed reduction."""
