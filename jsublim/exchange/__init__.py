"""What comes from elsewhere, and what goes there: rows, adapters, checkpoints, results."""
