"""LTE beside other ways to be sparse: quality, bytes, time."""
