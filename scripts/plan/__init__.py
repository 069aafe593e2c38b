"""Which settings of a step fit a machine."""
