"""The subcommands of ``escaip``, one module each.

A module's docstring is its help; it offers ``add_arguments(parser)`` and ``run(args)``, and
imports the standard library only: what takes long to load is imported in ``run``.
"""
