"""The Flower app: the folder that `flwr run` needs; see app.py."""
