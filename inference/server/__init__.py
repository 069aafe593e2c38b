"""An HTTP server with OpenAI's protocol for what was trained: python -m inference.server --path DIR."""
