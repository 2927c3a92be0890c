"""What is in a model, what would become of it, what is wrong with it, and what to pick."""
