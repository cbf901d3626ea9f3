"""Files to models: reading, checking, finding and loading them."""
