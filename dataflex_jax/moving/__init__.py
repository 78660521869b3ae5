"""From the YAML files of LLaMA-Factory and DataFlex to a recipe: what becomes of each field, or why none does."""
