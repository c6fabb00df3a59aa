"""pipelib: from web text to an evaluated GPT-2, in reproducible stages."""
