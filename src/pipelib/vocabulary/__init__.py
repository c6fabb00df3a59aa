"""Text to token ids: what a tokenizer is, GPT-2's, and the engines that encode with it."""
