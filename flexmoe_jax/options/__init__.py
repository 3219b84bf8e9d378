"""All options, each defined once: default, range and meaning. A file is named after its subpackage.

The options are kept outside of those subpackages and import none of them. A launcher can therefore
read, check and describe a config without JAX, which takes a second and 130 MB.
"""

from flexmoe_jax.options.assignment import AssignmentOptions
from flexmoe_jax.options.client import LocalLoss, LocalSteps, LocalWork, UploadOptions
from flexmoe_jax.options.data import DataOptions, PartitionOptions
from flexmoe_jax.options.deploy import DeployOptions
from flexmoe_jax.options.edge import EdgeOptions
from flexmoe_jax.options.execution import EvalOptions, ExecutionOptions
from flexmoe_jax.options.models import ModelOptions
from flexmoe_jax.options.record import KINDS, Options, Rule, option
from flexmoe_jax.options.server import Admission, Aggregation, FitnessOptions
from flexmoe_jax.options.simulation import ClientsOptions, FaultsOptions
from flexmoe_jax.options.tasks import TaskOptions

__all__ = [
    "KINDS",
    "Admission",
    "Aggregation",
    "AssignmentOptions",
    "ClientsOptions",
    "DataOptions",
    "DeployOptions",
    "EdgeOptions",
    "EvalOptions",
    "ExecutionOptions",
    "FaultsOptions",
    "FitnessOptions",
    "LocalLoss",
    "LocalSteps",
    "LocalWork",
    "ModelOptions",
    "Options",
    "PartitionOptions",
    "Rule",
    "TaskOptions",
    "UploadOptions",
    "option",
]
