"""Data policies: pure functions over a state pytree that decide what the model trains on."""
