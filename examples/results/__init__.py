"""What was measured: rows, tables, figures."""
