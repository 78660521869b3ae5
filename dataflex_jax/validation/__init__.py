"""How good scores of training examples are: whether they foretell what models trained on subsets of them learn."""
