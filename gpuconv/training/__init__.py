"""Training: the loop, the data, the recipe, model files and checkpoints, the run's folder."""
