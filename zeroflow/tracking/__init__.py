"""MLflow, written without training waiting for it."""
