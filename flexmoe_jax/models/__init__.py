"""Models as Linen modules: backbones, the mixture-of-experts layer and a fast convolution."""

from flexmoe_jax.models.backbones import BACKBONES, MLP, ConvNet, ResNet, make_backbone, max_pool
from flexmoe_jax.models.conv import Conv, conv_lax, conv_matmul, convolution
from flexmoe_jax.models.moe import (
    Experts,
    Gate,
    MoEClassifier,
    Routing,
    balance_loss,
    expert_mlp,
    merge_params,
    route,
    router_z_loss,
    split_params,
)

__all__ = [
    "BACKBONES",
    "MLP",
    "Conv",
    "ConvNet",
    "Experts",
    "Gate",
    "MoEClassifier",
    "ResNet",
    "Routing",
    "balance_loss",
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
