"""What can run plans and training, which one is chosen, and why."""
