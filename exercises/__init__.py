"""Write dpo.py yourself and have the proofs grade it. Find bugs that real programs had."""
