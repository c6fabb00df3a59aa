"""Text to token ids: the tokenizer class, GPT-2's tokenizer, and the engines that encode with it."""
