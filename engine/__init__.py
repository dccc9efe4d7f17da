"""What makes the ideas fast and safe. Nothing in here imports an idea: what is needed of one is handed over."""
