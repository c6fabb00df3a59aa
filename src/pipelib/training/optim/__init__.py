"""What changes the weights: optimizers behind one door, and the learning rate of every step."""
