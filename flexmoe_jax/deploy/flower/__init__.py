"""The Flower app: a folder that `flwr run` takes; see app.py."""
