"""The model as graphs whose nodes know their module."""
