"""What the doctor looks at: each check judges facts and returns findings; __main__.py puts them together."""
