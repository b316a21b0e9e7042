"""irgrow: networks as neuron-level graphs that grow while they train."""
