"""What runs on a client: training, what it sends and what it keeps."""

from flexmoe_jax.client.client import (
    Site,
    all_finite,
    appraise,
    log_shares,
    model_of,
    receive,
    select,
    settle,
    train_and_answer,
)
from flexmoe_jax.client.codec import (
    COMPRESSIONS,
    Codec,
    Compressor,
    decode,
    encode,
    init_residual,
    make_compressor,
)
from flexmoe_jax.client.losses import balance_loss, router_z_loss
from flexmoe_jax.client.training import (
    Augment,
    Batches,
    Learner,
    LocalTraining,
    Trained,
    draw_batches,
    proximal,
    scale_experts,
    train,
)

__all__ = [
    "COMPRESSIONS",
    "Augment",
    "Batches",
    "Codec",
    "Compressor",
    "Learner",
    "LocalTraining",
    "Site",
    "Trained",
    "all_finite",
    "appraise",
    "balance_loss",
    "decode",
    "draw_batches",
    "encode",
    "init_residual",
    "log_shares",
    "make_compressor",
    "model_of",
    "proximal",
    "receive",
    "router_z_loss",
    "scale_experts",
    "select",
    "settle",
    "train",
    "train_and_answer",
]
