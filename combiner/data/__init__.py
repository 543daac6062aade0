"""Data: a table of tasks, their sources, and one pipeline for all tasks."""
