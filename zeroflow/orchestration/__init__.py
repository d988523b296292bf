"""Everything that knows Prefect besides flows/."""
