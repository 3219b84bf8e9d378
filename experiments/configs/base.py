"""Every field that a training config has, with a default that works.

This config is not an experiment; the other files in this folder are. docs/options.md lists the
fields; they come from the records in `flexmoe_jax/options/`. Any field can be set on the command
line, as `--config.local.learning_rate=0.05`. Unknown fields and wrong types are rejected.
"""

from __future__ import annotations

from typing import Any

from ml_collections.config_dict import ConfigDict, FieldReference, placeholder

from experiments.options import RECORDS
from flexmoe_jax.options import Rule


def get_config() -> ConfigDict:
    """Returns a config with the default of every option."""
    config = ConfigDict()
    for record in RECORDS:
        if record.section and record.section not in config:
            config[record.section] = ConfigDict()
        section = config[record.section] if record.section else config
        for name, rule in record.rules().items():
            section[name] = _value(rule)
    return config


def _value(rule: Rule) -> Any:
    """Returns the default; a field for several types, or None, needs a reference that allows it."""
    if rule.default is None:
        return placeholder(rule.kind)
    return FieldReference(rule.default, field_type=object) if rule.kind is object else rule.default
