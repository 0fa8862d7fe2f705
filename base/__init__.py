"""The leaf every package stands on: strict configuration, one error family, storage through fsspec."""
