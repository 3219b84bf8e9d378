"""The suites of `experiments.bench`: each module's `run` takes words and yields figures."""
