"""What is measured on a GPU, and how."""
