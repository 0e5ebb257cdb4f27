"""The HTTP server: OpenAI's API, continuous batching, and a page."""
