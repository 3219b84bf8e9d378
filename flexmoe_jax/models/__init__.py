"""Models as Linen modules: backbones, the mixture-of-experts layer and a fast convolution."""

from flexmoe_jax.models.backbones import (
    BACKBONES,
    MLP,
    ConvNet,
    PersonalMixture,
    ResNet,
    make_backbone,
    max_pool,
)
from flexmoe_jax.models.conv import Conv, conv_lax, conv_matmul, convolution
from flexmoe_jax.models.moe import (
    FLEX_MOE,
    Experts,
    Gate,
    MoEClassifier,
    Ownership,
    Routing,
    balance_loss,
    check_ownership,
    expert_mlp,
    merge_params,
    route,
    router_z_loss,
    split_params,
)

__all__ = [
    "BACKBONES",
    "FLEX_MOE",
    "MLP",
    "Conv",
    "ConvNet",
    "Experts",
    "Gate",
    "MoEClassifier",
    "Ownership",
    "PersonalMixture",
    "ResNet",
    "Routing",
    "balance_loss",
    "check_ownership",
    "conv_lax",
    "conv_matmul",
    "convolution",
    "expert_mlp",
    "make_backbone",
    "max_pool",
    "merge_params",
    "route",
    "router_z_loss",
    "split_params",
]
