"""HTTP, the driving side: hypercorn, quart-trio, routes by subject."""
