"""A stage on a Ray cluster, through Ray Train: the only place that imports ray."""
