"""What every pass builds on: data flow, the captured graph, the runner."""
