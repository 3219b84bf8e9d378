"""Which model is trained, and who owns which part of it."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options import option


@dataclass(frozen=True)
class ModelOptions:
    """The model."""

    backbone: str = option("convnet", "mlp | cnn | convnet | resnet | transformer")
    widths: tuple[int, ...] | None = option(
        None, "of its layers; unset for its own default", kind=tuple
    )
    depth: int = option(
        0, "of resnet (6n+2), blocks of transformer; 0 for its own default", least=0
    )
    groups: int = option(0, "of the group normalisation; 0 for the backbone's default")
    conv: str = option("auto", "auto | matmul | direct | winograd | lax")
    heads: int = option(4, "of transformer's attention", least=1)
    positions: str = option("rotary", "of transformer's tokens", choices=("rotary", "learnt"))
    moe: str = option(
        "",
        "where experts stand: stages of resnet, as 1,2,3, or every n-th block of transformer, as 2; "
        "empty after the backbone, or in every block",
    )
    experts: int = option(8, "E", least=1)
    hidden: int = option(128, "H, hidden units of each expert", least=1)
    top_k: int = option(1, "experts per example", least=1)
    shared_experts: int = option(
        0, "beside those E: held by everybody, used on every example", least=0
    )
    gate: str = option(
        "shared",
        "whether a gate's row travels with its expert, or stays with its client",
        choices=("shared", "private"),
    )
    private: str = option(
        "", "parts of the model that stay with their clients, as head,backbone/local; empty for none"
    )
    local_backbone: bool = option(
        False, "whether a second backbone, of the client's own, is mixed in (pFedMoE)"
    )
    dtype: str = option(
        "float32",
        "of what is computed; parameters, sums and feedback stay in float32",
        choices=("float32", "bfloat16"),
    )
