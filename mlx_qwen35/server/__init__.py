"""A server: OpenAI's and Anthropic's APIs, and a page, in front of one model. Starlette's application is app.py."""
