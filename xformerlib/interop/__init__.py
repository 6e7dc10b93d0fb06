"""Models of other libraries as ours, with the same weights: one module for each library, imported on request."""
