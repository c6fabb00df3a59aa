"""What a run did: its record, and MLflow's view of it."""
