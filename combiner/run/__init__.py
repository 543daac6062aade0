"""A run in its workdir: its lock, config, checkpoints and data, and the processes that share it."""
