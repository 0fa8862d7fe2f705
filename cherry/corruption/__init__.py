"""Silent data corruption: suspicious steps computed again, and self-checks of each rank's device."""
