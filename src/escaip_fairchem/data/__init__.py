"""Data in: conversion to ASE-LMDB, an embedded sample, checks, splits and element references.

Nothing is imported here: ``checks`` and ``references`` need numpy and scipy alone, ``frames``,
``store``, ``convert`` and ``sample`` need ASE, and only ``datasets`` needs fairchem.
"""
