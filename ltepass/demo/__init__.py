"""A real model gets faster: the command `ltepass demo`."""
