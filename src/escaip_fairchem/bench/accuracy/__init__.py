"""``escaip bench accuracy``: models trained on the same frames with the same budget."""
