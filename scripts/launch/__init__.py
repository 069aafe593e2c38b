"""Start one step on this machine, on several nodes or under a scheduler."""
