"""Files: replaced whole or not at all, checkpoints, texts to train on, and foreign model folders.

Chapters 06 (texts), 07 (checkpoints) and 19 (model folders) use them.
"""
