"""Text that is shown to people: escaping of markup, hiding of passwords."""
