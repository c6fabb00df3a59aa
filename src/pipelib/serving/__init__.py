"""A server for models: OpenAI's endpoints, and a page for the browser."""
