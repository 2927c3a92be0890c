"""What a model has, how its layers are connected, and what runs of it show; nothing here changes a model."""
