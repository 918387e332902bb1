"""What takes turns in a benchmark of one token: descriptions to send to a process, and what they open there."""
