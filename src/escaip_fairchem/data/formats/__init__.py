"""Readers of published file formats, one module each, behind one interface (`base.Format`)."""
