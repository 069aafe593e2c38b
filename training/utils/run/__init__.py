"""One run: its process group and nodes, its loop, its metrics."""
