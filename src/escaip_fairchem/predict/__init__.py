"""Predictions of whole data sets: computed once, in parts, and what is made of them."""
