"""Importers: each reads one layout of raw files into the two raw tables of ``contract``."""
