"""Pages and plots: HTML that needs no other file, no script and no request."""
