"""Training under Slurm: the job's script, who submits and follows it, and what happens after each start."""
