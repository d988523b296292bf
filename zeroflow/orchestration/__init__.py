"""All code that depends on Prefect, except the scripts in flows/."""
