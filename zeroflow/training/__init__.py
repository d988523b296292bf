"""What a training process runs, and how it is started."""
