"""Build a LLaMA from scratch, train it, and measure every step."""
