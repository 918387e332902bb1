"""What a transformed model holds, and how it is watched."""
