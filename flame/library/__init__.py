"""The method for a model that is already loaded: `from flame import ...`, described in docs/library.md."""
