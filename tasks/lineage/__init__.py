"""Which models saw what, and what a model saw: read from MLflow, both ways."""
