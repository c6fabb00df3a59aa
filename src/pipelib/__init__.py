"""pipelib: from web text to an evaluated language model, in reproducible stages."""
