"""Training on Ray: the loop, what it is fed, what trains, and each model's training."""
