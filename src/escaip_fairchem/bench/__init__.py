"""What ``escaip bench`` measures, one module per question; see ``benchmarks/README.md``."""
