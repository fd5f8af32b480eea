"""The course's own tools: checks of exercises, and the exporter that writes notebooks' modules."""
