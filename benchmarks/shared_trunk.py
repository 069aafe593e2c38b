"""A command of an earlier version; former_modules.py names what took its place."""

from former_modules import run_successor

if __name__ == "__main__":
    run_successor(__spec__.name)
