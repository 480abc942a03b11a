"""Which rectifiers a model has, counting in place of them, entropy from counts."""
