"""Models of the metrics: one file a model."""
