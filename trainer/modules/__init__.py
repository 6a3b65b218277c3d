"""Modules: the building blocks of recommenders."""
