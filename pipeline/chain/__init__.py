"""A recipe's chain: resolved, checked, run step by step, judged at the gate."""
