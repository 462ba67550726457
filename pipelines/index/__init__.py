"""From embeddings on disk to a release: choose → train → add → tune → recall → release."""
