"""A page about a run: what the steps did to the model, answers before and after, curves. One HTML file that needs nothing else."""
