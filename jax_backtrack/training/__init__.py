"""Steps, reference margins, checkpoints, and the loop around them."""
