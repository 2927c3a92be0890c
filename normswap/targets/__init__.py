"""What each target makes of a norm or a weight layer: one function a form, built on values; nothing here changes a model."""
