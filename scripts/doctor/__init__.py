"""What the doctor looks at: one file a subject, each check a function; __main__.py puts them together."""
