"""Evaluate trained models: two models side by side, BLEU and ROUGE, reward scores."""
