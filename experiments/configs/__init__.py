"""Experiments as files: each has a `get_config` that changes fields of `base.get_config`."""
