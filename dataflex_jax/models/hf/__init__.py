"""Checkpoints in the formats of Hugging Face, in and out."""
