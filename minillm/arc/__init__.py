"""The arc of the course: the stages of its model, their settings, the cache that holds them, and
the scorecard."""
