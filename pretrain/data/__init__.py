"""From text to batches: preparation, the token store, and rows as pure functions of (seed, index)."""
