"""Fine-tuning: conversations, their masks and rows, and a model that answers. The training itself is that of `training`."""
