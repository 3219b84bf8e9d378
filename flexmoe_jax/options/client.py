"""Options of clients: how they train, and how their updates are compressed."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options.record import Options, option


@dataclass(frozen=True, kw_only=True)
class LocalWork(Options, section="local"):
    """The amount of work of a client in a round."""

    epochs: int = option(1, "passes over the client's examples in a round", least=1)
    batch_size: int = option(32, "B", least=1)
    max_steps: int = option(0, "cap on the local steps of a round; 0 for none", least=0)


@dataclass(frozen=True, kw_only=True)
class LocalSteps(Options, section="local"):
    """The training steps of a client."""

    optimizer: str = option(
        "sgd", "of the client, started anew each round", choices=("sgd", "adam")
    )
    learning_rate: float = option(0.1, "of that optimizer", above=0)
    expert_rate: float = option(
        1.0,
        "factor on it for experts and gate, whose gradients are small; not for those in "
        "model.private",
        above=0,
    )
    decay: str = option(
        "none",
        "of the learning rate, from round to round",
        choices=("none", "linear", "cosine"),
    )
    augment: str = option("none", "of training images: none | flip | crop | crop_flip")
    momentum: float = option(0.0, "of sgd", least=0)
    clip_norm: float = option(0.0, "cap on the gradient's global norm; 0 for none", least=0)
    proximal: float = option(0.0, "μ of FedProx", least=0)


@dataclass(frozen=True, kw_only=True)
class LocalLoss(Options, section="local"):
    """The terms of a client's loss beside the task's loss."""

    balance: float = option(
        0.1,
        "weight of the Switch-style balance loss over the held experts: keeps them all in use, "
        "evenly or, with fitness.affinity, as far as the server says",
        least=0,
    )
    z: float = option(0.0, "weight of the router z-loss", least=0)
    prior: float = option(
        0.0,
        "τ: the loss is taken of logits + τ log of the client's label shares, which then carry "
        "none (balanced softmax: Menon et al. 2007.07314; FedRoD, 2107.00778)",
        least=0,
    )


@dataclass(frozen=True)
class UploadOptions(Options, section="upload"):
    """The compression of updates."""

    compression: str = option("none", "of updates", choices=("none", "bfloat16", "int8", "top_k"))
    kept: float = option(0.1, "of top_k: part of the entries sent", above=0, most=1)
    error_feedback: bool = option(
        True,
        "whether what compression loses is added to the client's next update (Seide et al. 2014; "
        "Karimireddy et al. 2019, arXiv 1901.09847)",
    )
