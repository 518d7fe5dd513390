"""The tables and figures of the EScAIP paper, measured anew: each a CSV, a figure and the claim."""
