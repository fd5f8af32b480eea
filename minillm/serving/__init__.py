"""The chat server and its page, which `python -m minillm serve` starts (chapter 19)."""
