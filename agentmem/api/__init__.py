"""The languages of clients: OpenAI's, Anthropic's, and what they have in common."""
