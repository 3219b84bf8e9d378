"""How long tests wait for processes."""

HANGS = 900
"""Seconds after which a process is taken to hang; on a loaded machine one may take minutes."""
