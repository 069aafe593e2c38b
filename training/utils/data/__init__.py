"""From a data set to batches: sources, splits, tokenize, batching."""
