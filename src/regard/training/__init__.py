"""Training: the objective, the schedule, checkpoints, a run's folder, and the loop that uses them."""
