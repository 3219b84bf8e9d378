"""The suites of `experiments.bench`: each module's `run` takes arguments and yields figures."""
