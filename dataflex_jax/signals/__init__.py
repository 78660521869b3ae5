"""What a policy may observe of a model: losses, per-example gradients, embeddings, and sweeps over whole datasets."""
