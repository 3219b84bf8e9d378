"""Launchers of experiments; they hold no algorithm."""
