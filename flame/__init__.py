"""Train causal language models that also predict a summary of their own future."""
