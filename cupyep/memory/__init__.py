"""The memory of settling and learning: arrays laid over one another by their lifetimes, each allocated once."""
