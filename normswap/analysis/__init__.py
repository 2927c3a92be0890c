"""What a model has, what feeds what in it, and what runs of it show; nothing here changes a model."""
