"""How good, how sparse and how fast a model is."""
