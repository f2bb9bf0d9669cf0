"""Steps, reference, metrics, checkpoints, and the loop around them."""
