"""Client-level differential privacy: the mechanism that releases aggregates, and the accountant of what that costs."""
