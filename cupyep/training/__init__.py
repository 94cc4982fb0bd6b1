"""Training: configuration, run directory, trainer, display, teachers."""
