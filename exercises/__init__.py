"""Write dpo.py yourself and have it graded by the project's own proofs; find bugs that real implementations had."""
