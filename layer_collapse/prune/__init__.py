"""Which weights go: budgets, packed masks, masked optimisers."""
