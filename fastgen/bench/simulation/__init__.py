"""The real scheduler against a model of what steps cost, in virtual time."""
