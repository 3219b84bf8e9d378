"""Run a federation with real clients: the functions of `client` and `server` over Flower.

This needs the extra `deploy`. The server process and each client process run as long as the
federation. Flower's own processes carry messages between them (see `flower/app.py`).
"""

from flexmoe_jax.deploy.carrier import (
    Carrier,
    FlowerCarrier,
    LocalCarrier,
    LostError,
    answer_calls,
)
from flexmoe_jax.deploy.post import Facts, Post, natural
from flexmoe_jax.deploy.service import Common, ServerState, Service
from flexmoe_jax.deploy.wire import WireError
from flexmoe_jax.deploy.worker import Join, Mine, Setup, Worker, layout_of

__all__ = [
    "Carrier",
    "Common",
    "Facts",
    "FlowerCarrier",
    "Join",
    "LocalCarrier",
    "LostError",
    "Mine",
    "Post",
    "ServerState",
    "Service",
    "Setup",
    "WireError",
    "Worker",
    "answer_calls",
    "layout_of",
    "natural",
]
