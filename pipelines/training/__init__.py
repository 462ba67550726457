"""Training a matcher: an image tower and a text tower into one space, on Ray Train."""
