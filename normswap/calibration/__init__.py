"""What data tell about a model, how they are read, and the fit of a converted model to the one it came from."""
