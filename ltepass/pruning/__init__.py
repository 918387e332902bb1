"""Pruning: what never fires goes for good, and masks of single weights that grow by a schedule."""
