"""A check of everything that an accelerator changes; see `train.accelerator.__main__`."""
