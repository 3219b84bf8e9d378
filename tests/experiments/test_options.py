"""The records that configs are made of."""

from __future__ import annotations

from pathlib import Path

from experiments.cli import flat_fields
from experiments.configs import base
from experiments.options import RECORDS, describe
from flexmoe_jax import client, models, server, simulation
from flexmoe_jax.assignment import ROUNDINGS, SOLVERS
from flexmoe_jax.options import (
    AssignmentOptions,
    FaultsOptions,
    FitnessOptions,
    ModelOptions,
    UploadOptions,
)

ROOT = Path(__file__).parents[2]


def test_the_table_of_options_is_as_the_records_have_it():
    """Otherwise: python -m experiments.options > docs/options.md."""
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == describe()


def test_every_option_stands_once_with_a_meaning_and_a_default_that_fits():
    fields = [record.field(name) for record in RECORDS for name in record.rules()]
    assert len(set(fields)) == len(fields)
    assert flat_fields(base.get_config()).keys() == set(fields)
    for record in RECORDS:
        record()
        assert all(rule.meaning for rule in record.rules().values())


def choices(record, name) -> set[str]:
    return set(record.rules()[name].choices)


def test_choices_are_those_that_the_rooms_know():
    for name in choices(UploadOptions, "compression"):
        client.make_compressor(name)
    for name in choices(ModelOptions, "conv"):
        models.convolution(name)
    for name in choices(FitnessOptions, "score"):
        server.make_score(FitnessOptions(name))
    assert choices(FaultsOptions, "kind") == simulation.FAULTS.keys()
    assert choices(AssignmentOptions, "load") == {"auto", *server.LOAD_MODELS}
    for name, known in (("rounding", ROUNDINGS), ("solver", SOLVERS)):
        assert AssignmentOptions.rules()[name].default in known
