"""The OpenAI-compatible HTTP face of the engine; needs the extra `serve`."""
