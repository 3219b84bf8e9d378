"""All options, in the order of a config, and their table in docs/options.md.

python -m experiments.options > docs/options.md
"""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options import (
    Admission,
    Aggregation,
    AssignmentOptions,
    ClientsOptions,
    DataOptions,
    DeployOptions,
    EdgeOptions,
    EvalOptions,
    ExecutionOptions,
    FaultsOptions,
    FitnessOptions,
    LocalLoss,
    LocalSteps,
    LocalWork,
    ModelOptions,
    Options,
    PartitionOptions,
    TaskOptions,
    UploadOptions,
    option,
)


@dataclass(frozen=True)
class RunOptions(Options):
    """The run."""

    seed: int = option(0, "of all that is drawn", least=0)
    rounds: int = option(40, "how many", least=1)


@dataclass(frozen=True)
class CheckpointOptions(Options, section="checkpoint"):
    """What a run goes on from."""

    every: int = option(10, "rounds; the last round is always saved", least=1)
    keep: int = option(2, "how many stay", least=1)


@dataclass(frozen=True)
class DisplayOptions(Options):
    """What else is written."""

    tensorboard: bool = option(
        False, "whether event files are, in WORKDIR/tensorboard (extra: tensorboard)"
    )


RECORDS: tuple[type[Options], ...] = (
    RunOptions,
    DataOptions,
    TaskOptions,
    PartitionOptions,
    ClientsOptions,
    ModelOptions,
    LocalWork,
    LocalSteps,
    LocalLoss,
    Aggregation,
    Admission,
    UploadOptions,
    EdgeOptions,
    FaultsOptions,
    DeployOptions,
    AssignmentOptions,
    FitnessOptions,
    ExecutionOptions,
    EvalOptions,
    CheckpointOptions,
    DisplayOptions,
)
"""Records of all options; records of the same section are adjacent."""


_HEAD = """# Options

Every field of a config, with its default, written by `python -m experiments.options` from the
records in `flexmoe_jax/options/` and `experiments/options.py`. Any can be set on the command line,
as `--config.local.learning_rate=0.05`; in the library a record takes it by the last part of its
name.
"""


def describe() -> str:
    """Returns a Markdown document with a table for each record."""
    lines = [_HEAD]
    for record in RECORDS:
        lines += [f"## {_summary(record)} (`{record.__name__}`)", ""]
        lines += ["| field | default | values | meaning |", "| --- | --- | --- | --- |"]
        for name, rule in record.rules().items():
            default = "" if rule.default in (None, "") else f"`{rule.default}`"
            cells = [f"`{record.field(name)}`", default, rule.range, rule.meaning]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _summary(record: type[Options]) -> str:
    return (record.__doc__ or "").splitlines()[0].split(";")[0].rstrip(".")


if __name__ == "__main__":
    print(describe(), end="")
