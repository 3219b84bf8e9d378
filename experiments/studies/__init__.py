"""Studies: each file defines `get_study()`. `methods` and `tasks` are what they choose from."""
