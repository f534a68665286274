"""Continuous batching: requests, scheduler and block pool (no torch), cache, runner, engine."""
