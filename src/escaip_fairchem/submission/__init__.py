"""Files for leaderboards: written from predictions, checked, and described by a model card."""
