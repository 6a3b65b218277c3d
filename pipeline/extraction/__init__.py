"""Extraction: from a prepared dataset and a backbone to a feature table."""
