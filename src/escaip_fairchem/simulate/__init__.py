"""Simulations with a trained model, thin over ASE: what the commands of these names do."""
