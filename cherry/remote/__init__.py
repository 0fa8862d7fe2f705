"""Training on given hosts over ssh: an agent on each, and a supervisor that starts the job again when one is lost."""
