"""MLflow tracking that never makes training wait."""
