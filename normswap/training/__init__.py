"""Training a converted model: optimizers made before the conversion, and private training with Opacus."""
