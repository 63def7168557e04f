"""What attention is: its tensors and numbers, what masks mean, and the formula that every backend computes."""
