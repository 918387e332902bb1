"""Neurons become experts: one permutation of each site's rows."""
