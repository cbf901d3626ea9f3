"""How weights lie in memory or in a file: pack and unpack in NumPy, bit by bit."""
