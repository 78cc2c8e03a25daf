"""Batches of short and long sequences, each part on the backend that suits it: ``backend`` first."""
