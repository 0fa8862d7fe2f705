"""The order of the steps and the retry policy, and the `cherry` command that starts them."""
