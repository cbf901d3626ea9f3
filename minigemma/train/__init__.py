"""How a model learns: data, optimizer, trainer, and what a training begins with."""
