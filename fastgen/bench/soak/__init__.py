"""Thousands of requests of every conduct through one real engine, watched while they run."""
