"""Models: one file per recommender."""
