"""Every field that a training config has, with a default that works.

Not an experiment: the files beside this one are. docs/options.md lists the fields, made from the
records in `flexmoe_jax/options/`. Any can be set on the command line, as
`--config.local.learning_rate=0.05`; unknown fields and wrong types are refused.
"""

from __future__ import annotations

from typing import Any

from ml_collections.config_dict import ConfigDict, FieldReference, placeholder

from experiments.options import RECORDS
from flexmoe_jax.options import Rule


def get_config() -> ConfigDict:
    """The default of every option."""
    config = ConfigDict()
    for record in RECORDS:
        if record.section and record.section not in config:
            config[record.section] = ConfigDict()
        section = config[record.section] if record.section else config
        for name, rule in record.rules().items():
            section[name] = _value(rule)
    return config


def _value(rule: Rule) -> Any:
    """The default; a field that takes values of several types, or none, has to say so."""
    if rule.default is None:
        return placeholder(rule.kind)
    return FieldReference(rule.default, field_type=object) if rule.kind is object else rule.default
