"""Files: replaced whole or not at all, checkpoints of a run, text to train on, and model folders that others wrote."""
