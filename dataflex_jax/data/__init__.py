"""Where rows come from: sources of documents, the tokenised rows store, the sampler and the loader."""
