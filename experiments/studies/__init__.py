"""Studies: each file defines `get_study()`, with entries chosen from `methods` and `tasks`."""
