"""ChatGLM-6B (v1.1): configuration, network, tokenizer."""
