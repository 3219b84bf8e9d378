"""Config files of experiments: each has a `get_config` that changes fields of `base.get_config`."""
