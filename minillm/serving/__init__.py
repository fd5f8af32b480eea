"""The chat server and its page."""
