"""Clients with their own test examples, which they need if their data follow different rules.

Half of the clients have their pictures upside down. A common test set cannot measure how well a
client is served, since the same picture has another meaning there.
"""

import numpy as np

from examples.shared import classifier, federate, train
from flexmoe_jax import data, simulation

found = data.load(data.DataOptions("digits", train_limit=800, test_limit=400))
clients = 8
owner = np.arange(len(found.train_labels)) % clients  # of each example to train on
test_owner = np.arange(len(found.test_labels)) % clients  # and of each to test on


def hung(images, owner):
    """Turns the pictures of clients with odd numbers upside down."""
    return np.where((owner % 2 == 1)[:, None, None, None], images[:, ::-1], images)


train_set = {"images": hung(found.train_images, owner), "labels": found.train_labels}
test_set = {"images": hung(found.test_images, test_owner), "labels": found.test_labels}
parts = [np.flatnonzero(owner == c) for c in range(clients)]
counts = data.label_counts(found.train_labels, parts, 10)
theirs = data.join(train_set, parts, counts)

simulated, state = train(federate(classifier(), theirs), theirs, rounds=6)
test = simulation.chunk_test_set(test_set, group=test_owner.astype(np.int32))
result = simulated.evaluate(state, test, theirs.about)
for c, right in enumerate(np.asarray(result.personal_accuracy)):
    print(f"client {c}: {right:.0%} of its own test pictures")
