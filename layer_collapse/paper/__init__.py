"""The paper's experiments: networks on real data, one training loop for all, cached results."""
