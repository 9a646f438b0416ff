"""What is run rather than read: the comparison, the paper in miniature, and the recorded tables."""
