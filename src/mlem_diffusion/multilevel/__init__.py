"""The multilevel method: estimators, coins, gains, plans, and diagnostics of a family of levels."""
