"""What each target makes of a norm or a weight layer: one function a form. Nothing here changes a model."""
