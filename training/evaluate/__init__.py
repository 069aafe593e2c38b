"""What a trained model answers: two models side by side, BLEU and ROUGE, reward scores."""
