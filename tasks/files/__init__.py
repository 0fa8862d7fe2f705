"""Files that runs leave: outputs of steps, the store of prepared data, and locks."""
