"""From a data set to batches: sources, records, splits, tokens, batching; one cache."""
