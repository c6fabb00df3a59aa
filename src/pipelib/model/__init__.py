"""GPT-2: the network, its Hugging Face form, and text from it."""
