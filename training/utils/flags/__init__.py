"""The flags of the steps: one definition for command line, recipes, pages and errors."""
