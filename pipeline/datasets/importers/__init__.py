"""Importers: one file per raw layout."""
