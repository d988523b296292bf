"""Text for people: markup that is escaped, and passwords that are hidden."""
