"""Of ltepass/exporting."""
