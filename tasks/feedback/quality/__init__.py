"""What a project's annotators agree on: read from the store, shown and kept in MLflow."""
