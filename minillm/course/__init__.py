"""The course's own tools: the export of modules, exercises and their checks, and the book."""
