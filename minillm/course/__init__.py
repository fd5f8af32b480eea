"""The tools of the course itself: checks of exercises, and the exporter that writes modules from notebooks."""
