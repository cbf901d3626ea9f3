"""One formula a page: equation, definition, gradient, kernel."""
