"""What works around the algorithm: files, checkpoints, flags, a run's folder, figures."""
