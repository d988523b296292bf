"""All code that depends on Prefect, besides flows/."""
