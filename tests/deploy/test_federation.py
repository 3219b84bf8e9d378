"""A deployed federation equals the simulated one, and continues whichever part is stopped."""

from __future__ import annotations

import json
import re
from functools import partial

import jax
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord

from experiments.build import build
from experiments.deploying.checks import check_deployable, read_examples
from experiments.deploying.splitting import write_clients
from experiments.examples import load_examples
from experiments.train import train
from experiments.workdir import Workdir
from flexmoe_jax.checkpoint import Checkpoints
from flexmoe_jax.errors import InputError
from tests.deploy.conftest import a_town, small


def same(one, other):
    """Returns the metrics that differ, apart from times."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        keys = {k for k in mine | theirs if not k.startswith("time/") and "seconds" not in k}
        for key in keys:
            assert key in mine, key
            assert key in theirs, key
            if isinstance(mine[key], str):
                assert mine[key] == theirs[key], key
            else:
                np.testing.assert_allclose(
                    mine[key], theirs[key], rtol=1e-4, atol=1e-6, err_msg=key
                )


def parameters(workdir, like):
    state = Checkpoints(workdir.path / "checkpoints", 2).newest(like).state
    return jax.tree.leaves((state.server.shared, state.server.experts))


def check_against_simulation(town, served):
    """Compares a served run's figures and model with those of the same run, simulated."""
    simulated = Workdir(town.folder / "simulated")
    assert train(town.config, simulated) == "finished"
    same(served.read(), simulated.read())
    experiment = build(town.config)
    state = experiment.simulation.init(jax.random.key(0))
    pairs = zip(
        parameters(served, town.deployment._service.init(jax.random.key(0))),
        parameters(simulated, state),
        strict=True,
    )
    for mine, theirs in pairs:
        np.testing.assert_array_equal(mine, theirs)


BEYOND_LABELS = {"fitness__profile": "beyond_labels"}


def test_deployed_and_simulated_runs_are_the_same(make_town):
    by_kinds = {"partition__name": "dirichlet", "fitness__affinity": 3.0, **BEYOND_LABELS}
    town = make_town(assignment__layers="each", server__aggregator="median", **by_kinds)
    check_against_simulation(town, town.train())


PRIVATE = {"model__gate": "private", "upload__compression": "int8", "local__epochs": 2}
"""Clients keep something of their own from round to round."""


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A town that has been served for two rounds, its run, and the answers of client 0.

    Client 0 is asked everything twice; what counts is its second answer.
    """
    answers = []
    with a_town(tmp_path_factory.mktemp("private"), **PRIVATE) as town:
        worker = town.carrier.clients[100]

        def asked_twice(message):
            first, second = worker(message), worker(message)
            if message["ask"]["what"] == "train":
                answers.append((first, second))
            return second

        town.carrier.clients[100] = asked_twice
        return town, town.train(), answers


def test_private_gates_and_compressed_uploads_are_as_simulated(private):
    town, served, _ = private
    check_against_simulation(town, served)


def test_a_client_asked_again_gives_the_same_answer(private):
    *_, answers = private
    assert len(answers) == 2
    for first, second in answers:
        for name, record in first.array_records.items():
            for part, array in record.items():
                np.testing.assert_array_equal(array.numpy(), second[name][part].numpy())


def test_whatever_ends_and_begins_again_changes_nothing(make_town, private):
    whole = private[1].read()
    town = make_town(**PRIVATE)
    town.train(rounds=1)
    # The server is new; a client is new, at another node; another trains, and is gone before it
    # can answer.
    town.start(0)
    del town.carrier.clients[101]
    town.start(1, node=201)
    third, calls = town.start(2), []

    def dies_once(message):
        answer = third.answer(message)
        ask = message["ask"]
        if ask["what"] == "train" and not calls:
            calls.append(ask["round"])
            del town.carrier.clients[102]
            town.start(2, node=202)
            answer["answer"] = ConfigRecord({"round": -7})
        return answer

    town.carrier.clients[102] = dies_once
    continued = town.train(rounds=3).read()
    assert calls
    refused = [line for line in town.said if "no answer to round" in line]
    assert len(refused) == 1
    assert [row["round"] for row in continued] == [1, 2, 3]
    same(continued[:1], whole[:1])


def test_experts_that_moved_are_sent_again_after_a_refused_order(make_town):
    served = []
    for cache in (True, False):
        # Most experts are held by client 0 alone: they move in round 1, and stay in round 2.
        town = make_town(clients__count=2, clients__capacity=(4, 1), edge__cache=cache)
        worker = town.carrier.clients[100]

        def damaged(message, worker=worker):
            if message["ask"]["what"] == "train" and message["ask"]["round"] == 1:
                del message["shared"]
            return worker(message)

        town.carrier.clients[100] = damaged
        served.append(town.train(rounds=3, name=f"cache_{cache}").read())
    assert [row["clients/delivered"] for row in served[0]] == [2, 1, 2]
    same(*served)


def test_strangers_take_no_part_and_a_client_that_is_gone_holds_nobody_up(make_town):
    town = make_town(deploy__absence=0.5, deploy__deadline=600.0)
    town.train(rounds=1)
    stranger = town.start(0, node=300)
    stranger._hello["name"] = "stranger"
    del town.carrier.clients[101]
    rows = town.train(rounds=2).read()
    assert [row["clients/delivered"] for row in rows] == [3, 2]
    assert "client_1: did not answer in time (train)" in town.said
    assert sum("stranger: refused" in line for line in town.said) == 1
    # A page shows how clients stand.
    known = json.loads((town.folder / "served" / "clients.json").read_text())
    assert {name: one["state"] for name, one in known.items()} == {
        "client_0": "ready",
        "client_1": "away",
        "client_2": "ready",
    }
    assert known["client_1"]["late"] == 2  # Its training, and its figures.
    page = (town.folder / "served" / "clients.html").read_text()
    assert page.count("<tr>") == 4
    assert "refresh" not in page


def test_clients_with_other_examples_or_another_model_take_no_part(make_town):
    town = make_town()
    path = town.files[1]
    with np.load(path) as found:
        arrays = dict(found)
    arrays["train_images"] = arrays["train_images"][:, :5]
    np.savez(path, **arrays)
    town.start(1)
    town.carrier.clients[102] = partial(_of_another_model, town.carrier.clients[102])
    rows = town.train().read()
    assert [row["clients/delivered"] for row in rows] == [1, 1]
    line = next(line for line in town.said if line.startswith("client_1: takes no part"))
    assert "train_images=shape (5, 8, 1): the federation's are of shape (8, 8, 1)" in line
    assert "client_2: takes no part: has another model" in town.said


def test_no_round_passes_while_all_are_away_and_clients_return_as_they_were(make_town, monkeypatch):
    town = make_town(deploy__absence=0.5)
    town.train(rounds=1)
    monkeypatch.setattr("flexmoe_jax.deploy.post._QUIET", 0.0)
    clients, town.carrier.clients = town.carrier.clients, {}
    line = "all clients are away; the next round waits for one of them"

    def stop() -> bool:
        if line in town.said:
            town.carrier.clients = clients
        return False

    rows = town.train(rounds=2, stop=stop).read()
    assert [row["clients/delivered"] for row in rows] == [3, 3]
    assert town.said.count(line) == 1
    # Whoever ends the server meanwhile, interrupts the run.
    town.carrier.clients = {}
    workdir = town.train(rounds=3, stop=lambda: True, status="interrupted")
    summary = json.loads((workdir.path / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", 2)
    assert len(workdir.read()) == 2
    del workdir  # It locks the folder.

    # Clients that return with other examples take no part.
    town.carrier.clients = clients
    fewer, others = town.files[:2]
    with np.load(fewer) as found:
        np.savez(fewer, **{name: x[1:] for name, x in found.items()})
    with np.load(others) as found:
        np.savez(others, **{name: np.roll(x, 1, axis=0) for name, x in found.items()})
    town.start(0)
    town.start(1)
    rows = town.train(rounds=3).read()
    assert [row["clients/delivered"] for row in rows] == [3, 3, 1]
    refused = [line for line in town.said if "takes no part" in line]
    assert refused[0] == "client_0: takes no part: has 49 examples, and had 50 when the run began"
    assert "client_1: takes no part: data=other training examples" in refused[1]


def test_a_run_in_which_nobody_takes_part_ends_in_a_line(make_town):
    town = make_town()
    for node in (100, 101, 102):
        town.carrier.clients[node] = partial(_of_another_model, town.carrier.clients[node])
    with pytest.raises(InputError, match=r"nobody takes part: all have refused.*another model"):
        town.train()


def test_the_server_learns_the_label_shares_that_clients_tell(make_town):
    town = make_town(partition__name="dirichlet", fitness__affinity=3.0, **BEYOND_LABELS)
    town.start(1, tells_labels=False)
    town.carrier.clients[102] = partial(_of_impossible_shares, town.carrier.clients[102])
    workdir = town.train(rounds=1)
    assert sum("client_1 keeps its label shares" in line for line in town.said) == 1
    assert "client_2: takes no part: its label shares are not 10 parts of 1" in town.said
    begun = town.deployment._service.init(jax.random.key(0))
    roll = Checkpoints(workdir.path / "checkpoints", 2).newest(begun).state.clients
    counts = np.bincount(np.load(town.files[0])["train_labels"].astype(int), minlength=10)
    expected = np.stack([counts / counts.sum(), np.zeros(10), np.zeros(10)])
    np.testing.assert_allclose(roll.label_share, expected, rtol=1e-6)


def _of_impossible_shares(honest, message):
    answer = honest(message)
    if "ready" in answer:
        answer["ready"]["label_share"] = [0.5] * 10
    return answer


def _of_another_model(honest, message):
    answer = honest(message)
    if "ready" in answer:
        answer["ready"] = ConfigRecord({"layout": "another"})
    return answer


def _not_numbers(answer):
    answer["shared"] = ArrayRecord(
        {kind: Array(array.numpy() * np.nan) for kind, array in answer["shared"].items()}
    )


def _too_large(answer):
    answer["shared"] = ArrayRecord(
        {kind: Array(np.repeat(array.numpy(), 100)) for kind, array in answer["shared"].items()}
    )


def _of_a_later_round(answer):
    answer["answer"] = ConfigRecord({"round": int(answer["answer"]["round"]) + 1})


def _of_more_than_it_has(answer):
    answer["numbers"] = ConfigRecord({**answer["numbers"], "examples": 1e6, "units": 1e6})


HOSTILE = (
    (_not_numbers, ""),  # The quarantine counts it.
    (_too_large, "client_1: refused: shared holds"),
    (_of_a_later_round, "client_1: refused: is no answer to round"),
    (_of_more_than_it_has, "client_1: refused: says 1000000 examples where it can have"),
)


def test_hostile_answers_are_refused_and_the_federation_goes_on(make_town):
    """Two rounds of each kind; and figures that cannot be are refused after every round."""
    town, rounds = make_town(), np.repeat(np.arange(len(HOSTILE)), 2)
    honest = town.carrier.clients[101]

    def hostile(message):
        answer, ask = honest(message), message["ask"]
        if ask["what"] == "train":
            change, _ = HOSTILE[rounds[ask["round"]]]
            change(answer)
        if ask["what"] == "evaluate":
            answer["judged"] = ArrayRecord(
                {kind: Array(array.numpy() * 100) for kind, array in answer["judged"].items()}
            )
        return answer

    town.carrier.clients[101] = hostile
    rows = town.train(rounds=len(rounds)).read()
    assert [row["clients/quarantined"] for row in rows] == [1] * len(rounds)
    for _, said in HOSTILE:
        if said:
            assert sum(line.startswith(said) for line in town.said) == 2
    for row in rows:
        assert np.isfinite(row["eval/global_loss"])
        assert row["eval/clients"] == 2
        assert row["eval/personal_accuracy"] <= 1
    assert town.said.count("client_1: refused: judged: more hits than units") == len(rounds)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("edge__mix", "phone:1"),
        ("faults__share", 0.2),
        ("clients__newcomers", 1),
        ("eval__fine_tune", True),
        ("fitness__probe", "all"),
        ("fitness__profile", "given"),
    ],
)
def test_what_makes_no_sense_with_real_clients_is_refused(field, value):
    with pytest.raises(InputError, match=field.replace("__", ".")):
        check_deployable(small(**{field: value}))


def test_capacity_follows_from_what_clients_say_of_their_memory(make_town):
    town = make_town(clients__capacity="memory")
    with pytest.raises(InputError, match="capacity=client_0: does not say what memory it has"):
        town.train(name="silent")
    for number, memory in enumerate((10**9, 1, 10**9)):
        town.start(number, memory=memory)
    with pytest.raises(InputError, match=r"client 1 \(client_1\), needs \d+ bytes") as raised:
        town.train(name="small")
    town.start(1, memory=int(re.findall(r"needs (\d+) bytes", str(raised.value))[0]))
    rows = town.train(rounds=1).read()
    assert [row["clients/delivered"] for row in rows] == [3]
    with np.load(town.folder / "served" / "arrays.npz") as arrays:
        held = arrays["holds"].sum(axis=-1)
    assert held.ravel().tolist() == [4, 1, 4]


def test_a_client_without_test_examples_gets_a_file_that_it_can_read(tmp_path):
    rows, owners = np.arange(8), np.arange(8) % 2
    arrays = {
        f"{part}_{name}": values
        for part in ("train", "test")
        for name, values in (("images", np.eye(8)), ("labels", rows % 3), ("clients", owners))
    }
    np.savez(tmp_path / "mine.npz", **{**arrays, "test_clients": np.zeros(8, int)})
    config = small(data__name=str(tmp_path / "mine.npz"), partition__name="natural")
    config.clients.count, config.partition.min_per_client = 2, 1
    files = write_clients(load_examples(config), tmp_path / "clients")
    tests = [read_examples(path)[1] for path in files]
    assert [None if given is None else len(given["labels"]) for given in tests] == [8, None]


def test_a_folder_of_texts_is_a_clients_data(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 100)
    (tmp_path / "b.txt").write_text("0123456789" * 100)
    train, tests = read_examples(tmp_path, 50)
    assert train["tokens"].shape == (34, 51)  # 900 bytes of each, every 50 an example.
    assert tests is not None
    assert tests["tokens"].shape == (2, 51)
    assert bytes(train["tokens"][1][:3]) == b"abc"
    with pytest.raises(InputError, match="--length=2000: the longest text has 1000 bytes"):
        read_examples(tmp_path, 2000)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"--data=.*no \*.txt file"):
        read_examples(empty, 50)
