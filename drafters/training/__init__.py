"""Training of learned heads: data, losses and the loop."""
