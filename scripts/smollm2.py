"""``python -m scripts.smollm2`` runs the preset smollm2 of scripts/demo."""

from scripts.demo.__main__ import main

if __name__ == "__main__":
    main(preset="smollm2")
