"""What strangers' requests do to a neighbour's stream: the longest time between two of its pieces."""
