"""Real clients: the functions of `client` and `server` behind Flower's transport.

Needs the extra `deploy`. A server's process and each client's live as long as the federation;
Flower's own processes carry messages between them (see `flower/app.py`).
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
