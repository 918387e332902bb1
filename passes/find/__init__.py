"""Regions of the graphs become FFN sites, or refusals with a reason."""
