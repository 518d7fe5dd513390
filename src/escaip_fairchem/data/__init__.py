"""Data in: conversion to ASE-LMDB, an embedded sample, checks, splits and element references.

Nothing is imported here: ``checks`` and ``references`` need numpy and scipy alone, ``convert`` and
``sample`` and what they use need ASE, and only ``datasets`` needs fairchem.

A conversion goes from ``plan`` (which parts the inputs have) over ``work`` (a part is read into
chunks, which the ``journal`` keeps) to ``publish`` (split, duplicates, the folder itself).
"""
