"""Loading trained models, generating text and exporting."""
