"""The multilevel method: its estimators and coins, gains, plans, and diagnostics of a family of levels."""
