"""Walks every type of transformers' causal LMs and says what fastgen does with each.

`PYTHONPATH=tests python -m every_model`: each type in a process of its own, a table at the end.
"""
