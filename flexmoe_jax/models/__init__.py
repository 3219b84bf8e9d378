"""Models as pure functions: backbones, the mixture-of-experts layer and fast convolutions."""

from flexmoe_jax.models.backbones import (
    BACKBONES,
    MLP,
    ConvNet,
    PersonalMixture,
    ResNet,
    make_backbone,
    max_pool,
)
from flexmoe_jax.models.clustered import clustered
from flexmoe_jax.models.conv import (
    Conv,
    conv_auto,
    conv_direct,
    conv_lax,
    conv_matmul,
    conv_winograd,
    convolution,
)
from flexmoe_jax.models.dense import Dense
from flexmoe_jax.models.experts import expert_mlp
from flexmoe_jax.models.model import Held, Model, Routings, from_functions, from_linen
from flexmoe_jax.models.moe import (
    Classifier,
    Experts,
    Gate,
    MoEClassifier,
    MoELayer,
    classifier,
    route,
)
from flexmoe_jax.models.ownership import (
    EXPERT,
    FLEX_MOE,
    GATE,
    Layout,
    Marked,
    Ownership,
    check_capacity,
    lay_out,
    mark,
    mark_paths,
)
from flexmoe_jax.models.transformer import Transformer, decoder
from flexmoe_jax.types import Params, Routing

__all__ = [
    "BACKBONES",
    "EXPERT",
    "FLEX_MOE",
    "GATE",
    "MLP",
    "Classifier",
    "Conv",
    "ConvNet",
    "Dense",
    "Experts",
    "Gate",
    "Held",
    "Layout",
    "Marked",
    "MoEClassifier",
    "MoELayer",
    "Model",
    "Ownership",
    "Params",
    "PersonalMixture",
    "ResNet",
    "Routing",
    "Routings",
    "Transformer",
    "check_capacity",
    "classifier",
    "clustered",
    "conv_auto",
    "conv_direct",
    "conv_lax",
    "conv_matmul",
    "conv_winograd",
    "convolution",
    "decoder",
    "expert_mlp",
    "from_functions",
    "from_linen",
    "lay_out",
    "make_backbone",
    "mark",
    "mark_paths",
    "max_pool",
    "route",
]
