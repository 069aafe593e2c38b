"""Questions as rows of a database, answered by any number of workers: python -m inference.worker --database URL --path DIR."""
