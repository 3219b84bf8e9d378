"""Every metric of metrics.jsonl, recomputed with NumPy from the files of the run.

Checkpoints hold the models after every round. Clients take one step of all their examples, so that
what a round trained on, and how it was routed, follows from the models before it.

Axes: `C` clients, `E` experts, `M` examples, `Y` classes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.optimize
from ml_collections import ConfigDict

from experiments.build import build
from experiments.configs import base
from experiments.edge import make_devices
from experiments.examples import load_partitioned, split_clients
from experiments.fields import client_capacities
from experiments.train import train
from experiments.workdir import Workdir
from flexmoe_jax.data import Dataset
from flexmoe_jax.server import enrol
from flexmoe_jax.simulation.initial import init_owns

ROUNDS = 3
Tree = dict[str, Any]

COMMON = {
    "rounds": ROUNDS,
    "clients.count": 8,
    "model.backbone": "mlp",
    "model.widths": (16,),
    "model.experts": 4,
    "model.hidden": 8,
    "local.batch_size": 1000,  # all of a client's examples at once
    "checkpoint.every": 1,
    "checkpoint.keep": ROUNDS,
    "eval.batch_size": 47,
}
RUNS: dict[str, dict[str, object]] = {
    # Clients with rules and test examples of their own; gates of their own; no noise in the
    # fitness, so that the assignment can be solved anew. Two more are newcomers.
    "natural": {
        "clients.count": 10,
        "clients.newcomers": 2,
        "partition.name": "natural",
        "clients.capacity": 2,
        "model.gate": "private",
        "assignment.exploration": 0.0,
        "fitness.score": "loss",
    },
    # Clients that do not lean on their label shares.
    "lossy": {
        "clients.capacity": "1-3",
        "model.top_k": 2,
        "edge.dropout_during": 0.3,
        "upload.compression": "int8",
        "eval.every": 2,
        "eval.prior": False,
    },
    "faulty": {
        "clients.count": 10,
        "clients.newcomers": 2,
        "data.test_limit": 8,
        "partition.name": "k_class",
        "partition.classes_per_client": 2,
        "clients.per_round": 5,
        "clients.capacity": 1,
        "assignment.policy": "greedy",
        "assignment.load": "samples",
        "edge.mix": "sensor:1,phone:1",
        "faults.share": 0.25,
    },
}


def write_hospitals(path: Path) -> None:
    """Ten clients, whose labels are shifted by their number; the last has no test examples."""
    rng = np.random.default_rng(0)
    owner, truth = np.arange(600) % 10, rng.integers(0, 4, 600)
    images = (rng.normal(size=(600, 6)) + 3 * np.eye(4, 6)[truth]).astype(np.float32)
    labels = (truth + owner) % 4
    test = (np.arange(600) >= 500) & (owner != 9)
    train = np.arange(600) < 500
    np.savez(
        path,
        train_images=images[train],
        train_labels=labels[train],
        train_clients=owner[train],
        test_images=images[test],
        test_labels=labels[test],
        test_clients=owner[test],
    )


class Ran(NamedTuple):
    """A run as read from disk; of each state the arrays of the one MoE layer, by name.

    Clients that train are numbered from 0, and newcomers after them.
    """

    config: ConfigDict
    rows: list[dict[str, Any]]
    states: list[Tree]
    dataset: Dataset
    parts: tuple[np.ndarray, ...]
    numbers: np.ndarray  # of these among all, as the data set has them

    @property
    def seen(self) -> np.ndarray:
        """Training images of the clients that train."""
        return self.dataset.train_images[np.concatenate(self.parts[:8])]


@pytest.fixture(scope="module", params=RUNS)
def ran(request, tmp_path_factory) -> Ran:
    folder = tmp_path_factory.mktemp(request.param)
    config = base.get_config()
    config.update_from_flattened_dict(COMMON | RUNS[request.param])
    if request.param == "natural":
        config.data.name = str(folder / "hospitals.npz")
        write_hospitals(folder / "hospitals.npz")
    workdir = Workdir(folder / "run")
    assert train(config, workdir) == "finished"
    reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    found = [reader.restore(folder / "run" / "checkpoints" / str(t + 1)) for t in range(ROUNDS)]
    reader.close()
    dataset, parts = load_partitioned(config)
    numbers = np.concatenate(split_clients(config))
    ordered = tuple(parts[number] for number in numbers)
    return Ran(config, workdir.read(), list(map(opened, found)), dataset, ordered, numbers)


def opened(state: Tree) -> Tree:
    """Returns the state of the server and of the clients, with one group and one MoE layer."""
    server, clients = state["server"], state["clients"]
    ledger = {
        name: table[0]
        for name, table in server["ledger"].items()
        if name not in ("norms", "profile", "alike")
    }
    layers = {
        "experts": server["experts"]["mixture"],
        "gates": (clients["gates"] or {}).get("mixture", {}),
    }
    return {"shared": server["shared"], "slots": clients["slots"][:, 0], **layers, **ledger}


def standard(ran: Ran, images: np.ndarray) -> np.ndarray:
    """Returns (M, D) float64, standardised by channel with all training examples."""
    known = ran.seen.astype(np.float64)
    axes = tuple(range(known.ndim - 1))
    deviation = known.std(axes)
    scaled = (images - known.mean(axes)) / np.where(deviation > 0, deviation, np.inf)
    return scaled.reshape(len(images), -1)


class Outputs(NamedTuple):
    """Returns logits (M, Y), and which experts were used (M, E)."""

    logits: np.ndarray
    used: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def predict(ran: Ran, state: Tree, client: int, images: np.ndarray) -> Outputs:
    """Returns a client's model with the experts of its latest assignment."""
    held = np.isin(np.arange(ran.config.model.experts), state["slots"][client])
    gate = state["experts"].get("gate") or {
        name: leaf[client] for name, leaf in state["gates"]["gate"].items()
    }
    return compute(ran, state, held, gate, images)


def compute(ran: Ran, state: Tree, held: np.ndarray, gate: Tree, images: np.ndarray) -> Outputs:
    """Returns the model with these experts (E,) bool and this gate."""
    experts, shared = state["experts"]["expert"], state["shared"]
    layer = shared["backbone"]["Dense_0"]
    h = np.maximum(standard(ran, images) @ layer["kernel"] + layer["bias"], 0)
    weight = softmax(np.where(held, h @ gate["kernel"].T + gate["bias"], -1e30)) * held
    ranked = np.argsort(-np.where(held, weight, -1), axis=1)[:, : ran.config.model.top_k]
    used = np.zeros(weight.shape, bool)
    np.put_along_axis(used, ranked, True, axis=1)
    used &= held
    combine = weight * used
    if ran.config.model.top_k > 1:
        combine = combine / np.maximum(combine.sum(axis=1, keepdims=True), 1e-9)
    mixed = h.copy()
    for e in np.flatnonzero(held):
        inner = np.maximum(h @ experts["w_in"][e] + experts["b_in"][e], 0)
        mixed += combine[:, e, None] * (inner @ experts["w_out"][e] + experts["b_out"][e])
    return Outputs(mixed @ shared["head"]["kernel"] + shared["head"]["bias"], used)


class Judged(NamedTuple):
    """Returns (M,) for the test examples: whether the prediction is right, and the loss in nats."""

    hit: np.ndarray
    loss: np.ndarray


def judge(ran: Ran, probability: np.ndarray) -> Judged:
    labels = ran.dataset.test_labels
    right = probability[np.arange(len(labels)), labels]
    return Judged(probability.argmax(axis=1) == labels, -np.log(right))


def share_of(ran: Ran, client: int) -> np.ndarray:
    """Returns (Y,) counts of the classes among a client's training examples."""
    own = ran.dataset.train_labels[ran.parts[client]]
    return np.bincount(own, minlength=ran.dataset.num_classes) / len(own)


def personal(ran: Ran, client: int, logits: np.ndarray) -> tuple[float, float] | None:
    """Returns accuracy and loss on a client's own test examples; None if it has none."""
    labels, share = ran.dataset.test_labels, share_of(ran, client)
    if ran.config.eval.prior:
        logits = logits + np.log((share + 1e-3) / (1 + len(share) * 1e-3))
    judged = judge(ran, softmax(logits))
    if ran.dataset.test_clients is not None:
        mine = ran.dataset.test_clients == ran.numbers[client]
        return (judged.hit[mine].mean(), judged.loss[mine].mean()) if mine.any() else None
    there = [y for y in np.flatnonzero(share) if (labels == y).any()]
    if not there:
        return None
    by_class = [(judged.hit[labels == y].mean(), judged.loss[labels == y].mean()) for y in there]
    accuracy, loss = np.average(by_class, axis=0, weights=share[there])
    return accuracy, loss


def evaluation(ran: Ran, state: Tree) -> dict[str, float]:
    """Recomputes the `eval/` metrics."""
    test, experts = ran.dataset.test_images, ran.config.model.experts
    able = [c for c in range(8) if state["slots"][c, 0] < experts]
    if not able:
        return {"eval/clients": 0, "eval/personal_clients": 0}
    every = {c: predict(ran, state, c, test).logits for c in able}
    own = [figures for c in able if (figures := personal(ran, c, every[c])) is not None]
    common = [judge(ran, softmax(logits)) for logits in every.values()]
    joint = judge(ran, np.mean([softmax(logits) for logits in every.values()], axis=0))
    found: dict[str, float] = {
        "eval/clients": len(able),
        "eval/personal_clients": len(own),
        "eval/global_accuracy": np.mean([judged.hit.mean() for judged in common]),
        "eval/global_loss": np.mean([judged.loss.mean() for judged in common]),
        "eval/server_accuracy": joint.hit.mean(),
        "eval/server_loss": joint.loss.mean(),
    }
    if own:
        accuracy, loss = np.transpose(own)
        found["eval/personal_accuracy"] = accuracy.mean()
        found["eval/personal_accuracy_p10"] = np.percentile(accuracy, 10)
        found["eval/personal_loss"] = loss.mean()
    if ran.config.model.gate == "shared":
        # No part stays with a client, so all experts fit together in one model.
        gate, whole = state["experts"]["gate"], np.ones(experts, bool)
        assembled = judge(ran, softmax(compute(ran, state, whole, gate, test).logits))
        found["eval/assembled_accuracy"] = assembled.hit.mean()
        found["eval/assembled_loss"] = assembled.loss.mean()
    return found


def test_accuracies_and_losses(ran: Ran) -> None:
    for row, state in zip(ran.rows, ran.states, strict=True):
        evaluated = row["round"] % ran.config.eval.every == 0 or row["round"] == ROUNDS
        expected = evaluation(ran, state) if evaluated else {}
        found = {
            key: row[key]
            for key in row
            if key.startswith("eval/") and not key.startswith("eval/newcomer")
        }
        losses = {key for key in expected if key.endswith("_loss")}
        assert {key for key in found if key.endswith("_loss")} == losses
        for key in losses:
            assert found.pop(key) == pytest.approx(expected.pop(key), rel=1e-4), key
        assert found == pytest.approx(expected)


def probed(ran: Ran, state: Tree, client: int) -> np.ndarray:
    """Returns the (E,) scores of the experts, each held alone, on all of a client's examples."""
    images, labels = ran.dataset.train_images[ran.parts[client]], ran.dataset.train_labels
    experts, right = ran.config.model.experts, np.arange(len(images))
    gate = {"kernel": np.zeros((experts, 16)), "bias": np.zeros(experts)}
    found = []
    for e in range(experts):
        logits = compute(ran, state, np.arange(experts) == e, gate, images).logits
        hit = logits.argmax(axis=1) == labels[ran.parts[client]]
        loss = -np.log(softmax(logits)[right, labels[ran.parts[client]]])
        loss_counts = ran.config.fitness.score == "loss"
        found.append(np.exp(-loss.mean()) if loss_counts else hit.mean())
    return np.array(found)


def enrolled(ran: Ran, fitness: np.ndarray) -> np.ndarray:
    """Returns (2, E) bool, the fittest experts of each newcomer; the seed breaks ties."""
    capacity = ran.config.clients.capacity
    (found,) = enrol(fitness[None], np.full(2, capacity), ran.config.seed)
    best = np.sort(fitness, axis=1)[:, -capacity:]
    assert np.allclose(np.sort(fitness[found.assignment].reshape(2, -1), axis=1), best)
    return found.assignment


def test_newcomers(ran: Ran) -> None:
    """Newcomers have not trained, and choose experts by scores on their own examples."""
    keys = {key for row in ran.rows for key in row if "newcomer" in key}
    if not ran.config.clients.newcomers:
        assert not keys
        return
    coming = (8, 9)
    # Gates of their own are as they were drawn, which is nowhere on disk.
    federation = build(ran.config).simulation.setting.federation
    key = jax.random.key(ran.config.seed)
    _, owns = init_owns(federation, key, jnp.array(coming, jnp.int32))
    for row, state in zip(ran.rows, ran.states, strict=True):
        held = enrolled(ran, np.array([probed(ran, state, c) for c in coming]))
        found = []
        for c, experts in zip(coming, held, strict=True):
            gate = state["experts"].get("gate") or {
                name: np.asarray(leaf[c - 8])
                for name, leaf in owns.gates["mixture"]["gate"].items()
            }
            logits = compute(ran, state, experts, gate, ran.dataset.test_images).logits
            found.append(personal(ran, c, logits))
        figures = [each for each in found if each is not None]
        assert row["eval/newcomer_clients"] == len(figures)
        accuracy, loss = np.mean(figures, axis=0)
        assert row["eval/newcomer_accuracy"] == pytest.approx(accuracy)
        assert row["eval/newcomer_loss"] == pytest.approx(loss, rel=1e-4)
        assert row["assignment/newcomer_status"] == "optimal"
        parts = [leaves(state["shared"]), leaves(state["experts"])]
        whole = sum(leaf.nbytes for part in parts for leaf in part)
        assert row["comm/newcomer_bytes_down"] == 2 * whole
        assert row["comm/newcomer_bytes_up"] == 2 * ran.config.model.experts * 12


def variation(load: np.ndarray) -> float:
    return float(np.std(load) / np.mean(load))


def holders(ran: Ran, state: Tree) -> np.ndarray:
    """Returns (C, E) bool, the experts that each client held in the round before this state."""
    return (state["slots"][:, :, None] == np.arange(ran.config.model.experts)).any(axis=1)


def test_training_load_and_clients(ran: Ran) -> None:
    """From the second round on, whose models before it are known."""
    sizes = np.array([len(part) for part in ran.parts[:8]])
    images, labels = ran.dataset.train_images, ran.dataset.train_labels
    for row, before, after in zip(ran.rows[1:], ran.states, ran.states[1:], strict=False):
        # Clients that took part hold the assigned experts; those that trained also delivered.
        asked, held = cohort(ran, row), holders(ran, after)
        trained = (after["held_rounds"] > before["held_rounds"]).any(axis=1)
        start = before | {"slots": after["slots"]}
        losses, usage = np.zeros(8), np.zeros(held.shape)
        for c in np.flatnonzero(trained):
            outputs = predict(ran, start, c, images[ran.parts[c]])
            right = softmax(outputs.logits)[np.arange(sizes[c]), labels[ran.parts[c]]]
            losses[c], usage[c] = -np.log(right).mean(), outputs.used.sum(axis=0)
        mine = np.where(asked, sizes, 0) if ran.config.assignment.load == "samples" else asked
        weighed = mine[:, None] * held
        if ran.config.assignment.load == "auto" and ran.config.clients.capacity == "1-3":
            weighed = foreseen(ran, before, sizes) * held
        assigned, total = weighed.sum(axis=0), after["load"]
        expected = {
            "train/loss": np.average(losses, weights=sizes * trained),
            "load/assigned": assigned,
            "load/usage": usage.sum(axis=0),
            "load/assigned_cv": variation(assigned),
            "load/assigned_cv_cumulative": variation(total),
            "load/usage_cv": variation(usage.sum(axis=0)),
            "load/usage_cv_cumulative": variation(before["usage"].sum(axis=0) + usage.sum(axis=0)),
            "clients/asked": asked.sum(),
            "clients/delivered": trained.sum() + row["clients/quarantined"],
            "clients/quarantined": (asked & ~trained).sum() if ran.config.faults.share else 0,
        }
        assert np.allclose(total, before["load"] + assigned, rtol=1e-5)
        for key, value in expected.items():
            assert np.allclose(row[key], value, rtol=1e-4), key


def cohort(ran: Ran, row: dict[str, Any]) -> np.ndarray:
    """Returns (C,) bool, the clients of the round: all, or those drawn without replacement."""
    if not ran.config.clients.per_round:
        return np.ones(8, bool)
    drawn = np.random.default_rng([ran.config.seed, row["round"] - 1])
    chosen = np.zeros(8, bool)
    chosen[drawn.choice(8, ran.config.clients.per_round, replace=False)] = True
    return chosen


def foreseen(ran: Ran, before: Tree, sizes: np.ndarray) -> np.ndarray:
    """Returns (C, E) expected examples of a holder: the mean so far, or at first an even share."""
    options = ran.config
    capacity = client_capacities(options.clients.capacity, 8, options.model.experts, options.seed)
    even = sizes * np.minimum(options.model.top_k, capacity) / capacity
    rounds = before["held_rounds"]
    return np.where(rounds > 0, before["usage"] / np.maximum(rounds, 1), even[:, None])


def leaves(tree: Any) -> list[np.ndarray]:
    return [x for v in tree.values() for x in leaves(v)] if isinstance(tree, dict) else [tree]


def test_bytes_and_time(ran: Ran) -> None:
    for row, before, after in zip(ran.rows[1:], ran.states, ran.states[1:], strict=False):
        asked, held = cohort(ran, row), holders(ran, after)
        trained = (after["held_rounds"] > before["held_rounds"]).any(axis=1)
        delivered = asked if ran.config.faults.share else trained
        shared = leaves(before["shared"])
        expert = [leaf[0] for leaf in leaves(before["experts"])]
        whole = [sum(leaf.nbytes for leaf in part) for part in (shared, expert)]
        # int8 sends a byte an entry, and a step of four bytes an array.
        small = [sum(leaf.size + 4 for leaf in part) for part in (shared, expert)]
        up = small if ran.config.upload.compression == "int8" else whole
        there = (held & before["current"]).sum(axis=1)
        down_each = whole[0] + (held.sum(axis=1) - there) * whole[1]
        up_each = up[0] + held.sum(axis=1) * (up[1] + 12)  # feedback: three numbers an expert
        assert row["comm/bytes_down"] == down_each[asked].sum()
        assert row["comm/bytes_up"] == up_each[delivered].sum()
        assert row["comm/bytes_cached"] == (there[asked] * whole[1]).sum()
        sizes = np.array([len(part) for part in ran.parts[:8]])
        speed = row["time/train_examples_per_second"]
        assert speed * row["time/round_seconds"] == pytest.approx(sizes[trained].sum())
        assert 0 <= row["assignment/solve_seconds"] <= row["time/round_seconds"]
        if devices := make_devices(ran.config.edge, 10, ran.config.seed):
            down, speed, up = (
                x[ran.numbers[:8]] for x in (devices.down, devices.speed, devices.up)
            )
            needed = down_each / down + sizes / speed + up_each / up
            assert row["time/simulated_seconds"] == pytest.approx(needed[asked].max())


def test_the_clock_of_the_run(ran: Ran) -> None:
    """An assignment is solved during the evaluation of the round before, and counts there."""
    clock = [row["time/run_seconds"] for row in ran.rows]
    for row, before, now in zip(ran.rows, [0.0, *clock], clock, strict=False):
        assert now - before >= row["time/round_seconds"] - row["assignment/solve_seconds"]


def test_assignments(ran: Ran) -> None:
    """Recomputes the gap where the assignment can be solved again, and checks the status."""
    for row, before, after in zip(ran.rows[1:], ran.states, ran.states[1:], strict=False):
        assert row["assignment/gap"] >= 0
        asked, held = cohort(ran, row), holders(ran, after)
        worth = float(before["fitness"][asked][held[asked]].sum())
        if ran.config.assignment.policy == "greedy":
            best = np.sort(before["fitness"][asked], axis=1)[:, -1].sum()
            assert worth == pytest.approx(best)
            assert (row["assignment/gap"], row["assignment/status"]) == (0, "optimal")
        elif not ran.config.assignment.exploration:
            best = linear_optimum(before, slack=ran.config.assignment.slack)
            gap = max(best - worth, 0) / abs(best)
            assert row["assignment/gap"] == pytest.approx(gap, abs=1e-6)
            assert row["assignment/status"] == "optimal"
        else:
            assert row["assignment/status"] in ("optimal", "feasible", "violated", "relaxed")


def linear_optimum(before: Tree, slack: float) -> float:
    """Solves the relaxation with load as holders: two experts a client, loads near the targets."""
    fair = 8 * 2 / 4
    target = fair + before["deficit"]
    low = np.minimum(np.ceil(target - slack * fair), np.floor(target))
    high = np.maximum(np.floor(target + slack * fair), np.ceil(target))
    by_expert = np.tile(np.eye(4), (1, 8))
    found = scipy.optimize.linprog(
        -before["fitness"].ravel(),
        A_ub=np.vstack([by_expert, -by_expert]),
        b_ub=np.concatenate([high, -low]),
        A_eq=np.kron(np.eye(8), np.ones(4)),
        b_eq=np.full(8, 2),
        bounds=(0, 1),
    )
    return float(-found.fun)


COUNTED = {
    *("round", "train/loss", "assignment/gap", "assignment/status", "assignment/solve_seconds"),
    *(f"load/{word}" for word in ("assigned", "usage")),
    *(f"load/{word}_cv{span}" for word in ("assigned", "usage") for span in ("", "_cumulative")),
    *(f"clients/{word}" for word in ("asked", "delivered", "quarantined")),
    *(f"comm/bytes_{way}" for way in ("down", "up", "cached")),
    *(
        f"eval/{word}_{figure}"
        for word in ("personal", "global", "server", "assembled")
        for figure in ("accuracy", "loss")
    ),
    *("eval/clients", "eval/personal_clients", "eval/personal_accuracy_p10"),
    *(f"eval/newcomer_{figure}" for figure in ("accuracy", "loss", "clients")),
    *("assignment/newcomer_status", "comm/newcomer_bytes_down", "comm/newcomer_bytes_up"),
    *("time/round_seconds", "time/train_examples_per_second", "time/simulated_seconds"),
    "time/run_seconds",
}


def test_no_figure_is_left_out(ran: Ran) -> None:
    """Every new metric must be recomputed here, too."""
    for t, row in enumerate(ran.rows):
        assert row["round"] == t + 1
        assert row.keys() <= COUNTED
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, int | float))
