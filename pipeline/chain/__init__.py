"""A recipe's chain: it is resolved, checked and run step by step, up to the promotion gate."""
