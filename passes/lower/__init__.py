"""Gated FFNs become the sparse op."""
