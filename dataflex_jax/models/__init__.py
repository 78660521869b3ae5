"""The language model: its configuration, the decoder, attention, the training loss."""
