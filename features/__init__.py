"""The feature store: schemas, atomic files, contiguous reading, SQL views, datasets, splits."""
