"""Training: where model, engine, data and checkpoints meet, the loop, and what is done with its result."""
