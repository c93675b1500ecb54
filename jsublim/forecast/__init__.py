"""What an experiment would cost, whether it fits, and how long it would take, before anything of it is run."""
