"""All code that depends on Prefect, except flows/."""
