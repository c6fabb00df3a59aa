"""The trainer: launch, optimizer, checkpoints, loop."""
