"""The two stages of the paper, in transformers' Trainer or in a loop of one's own."""
