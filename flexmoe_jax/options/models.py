"""Options of the model: which model is trained, and who owns which part of it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from flexmoe_jax.errors import InputError
from flexmoe_jax.options.record import Options, option


@dataclass(frozen=True)
class ModelOptions(Options, section="model"):
    """The model."""

    backbone: str = option("convnet", "mlp | cnn | convnet | resnet | transformer")
    widths: tuple[int, ...] | None = option(
        None, "of its layers; unset for its own default", kind=tuple
    )
    depth: int = option(
        0, "of resnet (6n+2), blocks of transformer; 0 for its own default", least=0
    )
    heads: int = option(4, "of transformer's attention", least=1)
    positions: str = option("rotary", "of transformer's tokens", choices=("rotary", "learnt"))
    moe_every: int = option(
        1, "of transformer: experts in every n-th block, the last one first", least=1
    )
    moe_stages: str = option(
        "",
        "of resnet: stages with experts after them, as 1,2,3; empty for experts after any backbone",
    )
    groups: int = option(0, "of the group normalisation; 0 for the backbone's default", least=0)
    conv: str = option(
        "auto",
        "how convolutions are computed (docs/speed.md)",
        choices=("auto", "matmul", "direct", "winograd", "lax"),
    )
    dtype: str = option(
        "float32",
        "of the model's products, forward and back; parameters, sums, gates, norms and losses are "
        "float32 in any case",
        choices=("float32", "bfloat16"),
    )
    experts: int = option(8, "E", least=1)
    hidden: int = option(128, "H, hidden units of an expert", least=1)
    whole_experts: bool = option(
        False, "whether each expert is a whole model by itself, with one hidden layer of H units"
    )
    top_k: int = option(1, "experts per example", least=1)
    shared_experts: int = option(
        0, "beside those E: held by everybody, used on every example", least=0
    )
    gate: str = option(
        "shared",
        "whether a gate's row travels with its expert, or stays with its client",
        choices=("shared", "private"),
    )
    router: bool = option(
        False,
        "whether a gate over all experts, which everybody shares, is learnt beside clients' own: "
        "the one that the assembled model goes by",
    )
    private: str = option(
        "",
        "parts of the model that stay with their clients, as head,backbone/local; empty for none",
    )
    local_backbone: bool = option(
        False, "whether a second backbone, of the client's own, is mixed in (pFedMoE)"
    )

    def __post_init__(self) -> None:
        """Refuses values that do not fit, including the widths."""
        super().__post_init__()
        check_widths(self.widths or ())
        if self.top_k > self.experts:
            raise InputError(
                "model.top_k", self.top_k, f"choose at most model.experts={self.experts}"
            )


def check_widths(widths: tuple[int, ...]) -> None:
    """Refuses widths that are not whole numbers of at least 1.

    Raises:
      InputError: naming the widths.
    """
    if not all(isinstance(width, Integral) and width >= 1 for width in widths):
        raise InputError("model.widths", widths, 'choose whole numbers of 1 or more: "(32, 64)"')
