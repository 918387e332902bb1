"""Every architecture, transformed, gated and lowered."""
