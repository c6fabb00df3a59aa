"""Models: what every family promises, the families, their Hugging Face form, and text from them."""
