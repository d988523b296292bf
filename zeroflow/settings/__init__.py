"""What a run is asked to be, and what that is settled to."""
