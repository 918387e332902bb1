"""A model as a folder that decodes by itself: two compiled graphs, their weights, the kernels and the tokenizer."""
