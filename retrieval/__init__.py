"""Full-catalogue ranking, indexes, metrics and their confidence intervals."""
