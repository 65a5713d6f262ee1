"""What is beside generation: models, tokens, health, metrics, slots, events, and cancelling by id."""
