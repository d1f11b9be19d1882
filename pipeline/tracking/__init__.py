"""MLflow runs, other sinks, and the steps of a home directory, each done once."""
