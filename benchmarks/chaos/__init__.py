"""Chaos: faults at random moments of real jobs, and what they cost. Several hosts need root, for namespaces."""
