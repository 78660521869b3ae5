"""Data-centric dynamic training of language models in JAX: policies decide what a model trains on while it trains."""

__version__ = "0.1.0"
