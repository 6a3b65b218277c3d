"""Runs: specify, train, evaluate and search runs."""
