"""Routers and gates go in, and out again."""
