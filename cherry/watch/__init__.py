"""What is seen of a running job besides its losses: each rank's pace, stragglers, and what each node uses. No torch."""
