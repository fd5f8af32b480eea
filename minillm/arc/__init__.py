"""The arc of the course: the stages of its model, their settings, the cache that they are kept in,
and the scorecard."""
