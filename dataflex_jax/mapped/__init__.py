"""Many small models trained as one program: what a swarm, an ensemble, seeds or subsets of the data are made of."""
