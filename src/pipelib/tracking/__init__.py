"""The record of a run, and MLflow's copy of it."""
