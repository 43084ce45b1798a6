"""The memory plan of a training run, from a checkpoint's headers."""
