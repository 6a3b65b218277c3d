"""Datasets: their registry, preparation and canonical tables."""
