"""Times of the sparse op against what one would pick instead."""
