"""Every text tokenised once into memory-mapped arrays."""
