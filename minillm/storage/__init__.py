"""Files: replaced whole or not at all, checkpoints, texts to train on, and other people's model
folders and adapters.

Chapters 06 (texts), 07 (checkpoints), 12 (adapters) and 19 (model folders) use them.
"""
