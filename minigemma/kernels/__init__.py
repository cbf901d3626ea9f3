"""How it is fast: vectors, tiles, threads, and the products and loops made of them."""
