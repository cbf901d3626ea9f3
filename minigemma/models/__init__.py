"""One paper a page: sizes, layer pattern, tensor names, block."""
