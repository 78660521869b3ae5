"""Which mixture of the domains to train on: swarms of small models, a law fitted to their losses, and a proposal."""
